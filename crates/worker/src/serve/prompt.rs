//! A request's prompt or inputs to tokens, and the room that the context leaves for an answer.
use lathe_engine::files::{ChatTemplate, FileError, Tokenizer};
use std::sync::Arc;

use super::error::ApiError;
use super::request::{Content, Input, Prompt, Request};

/// Tokens of all inputs of a request for embeddings, as OpenAI; one input may always fill the context.
const MAX_INPUT_TOKENS: usize = 300_000;

/// What turns prompts into tokens.
#[derive(Debug)]
pub struct Prompter {
    /// The model's.
    pub tokenizer: Arc<Tokenizer>,
    /// Absent for a base model.
    pub template: Option<ChatTemplate>,
    /// Begins an empty prompt.
    pub bos: Option<u32>,
    /// Entries of the embedding table.
    pub vocab: usize,
    /// Longest prompt and answer together.
    pub context: usize,
}

/// A prompt in tokens, and how many more may follow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// Between 1 and the context less 1.
    pub prompt: Vec<u32>,
    /// At least 1; with the prompt at most the context.
    pub max_tokens: usize,
}

impl Prompter {
    /// Renders, tokenises and measures. Takes time that grows with the prompt: not for an event loop.
    ///
    /// # Errors
    /// 400: no template, or it refuses the messages; a token that the model does not have; no room in the context.
    pub fn read(&self, request: &Request, now: jiff::Timestamp) -> Result<Tokens, ApiError> {
        let (param, prompt) = match &request.prompt {
            Prompt::Chat(messages) => {
                let template = self.template.as_ref().ok_or_else(|| {
                    let message = "This model has no chat template; use /v1/completions.";
                    ApiError::field("messages", "no_chat_template", message)
                })?;
                let text = template.render(messages, true, now).map_err(|e| refused("messages", &e))?;
                ("messages", self.encode(&text, false, "messages")?)
            }
            Prompt::Text(text) => ("prompt", self.encode(text, true, "prompt")?),
            Prompt::Tokens(tokens) => ("prompt", self.known(tokens, "prompt")?),
        };
        self.room(param, self.begun(prompt, param)?, request)
    }

    /// The tokens of inputs to be embedded, each at most the context: of a text what the tokenizer makes of it, which for
    /// some models begins or ends with a special token, and nothing beside it.
    ///
    /// # Errors
    /// 400: an input is too long, or all together are; a token that the model does not have.
    pub fn read_inputs(&self, inputs: &[Input]) -> Result<Vec<Vec<u32>>, ApiError> {
        let mut total = 0;
        let read = |Input { path, content }: &Input| {
            let tokens = match content {
                Content::Tokens(tokens) => self.known(tokens, path)?,
                Content::Text(text) => self.encode(text, true, path)?,
            };
            let tokens = self.begun(tokens, path)?;
            if tokens.len() > self.context {
                return Err(ApiError::input_too_long(path, self.context, tokens.len()));
            }
            total += tokens.len();
            let most = MAX_INPUT_TOKENS.max(self.context);
            if total > most {
                let message = format!(
                    "Invalid 'input': all inputs together must have at most {most} tokens; send several requests."
                );
                return Err(ApiError::field("input", "max_tokens_per_request", message));
            }
            Ok(tokens)
        };
        inputs.iter().map(read).collect()
    }

    /// Never nothing.
    fn begun(&self, tokens: Vec<u32>, param: &str) -> Result<Vec<u32>, ApiError> {
        match (tokens.is_empty(), self.bos) {
            (true, Some(bos)) => Ok(vec![bos]),
            (true, None) => {
                let message =
                    format!("Invalid '{param}': it has no tokens, and this model has none to begin with.");
                Err(ApiError::field(param, "empty_prompt", message))
            }
            (false, _) => Ok(tokens),
        }
    }

    fn room(&self, param: &str, prompt: Vec<u32>, request: &Request) -> Result<Tokens, ApiError> {
        let used = prompt.len();
        let settings = &request.settings;
        let left = self.context.saturating_sub(used);
        if left == 0 {
            return Err(ApiError::context_exceeded(param, self.context, used, settings.max_tokens));
        }
        let max_tokens = match settings.max_tokens {
            Some(asked) if asked > left => {
                return Err(ApiError::context_exceeded(param, self.context, used, Some(asked)));
            }
            Some(asked) => asked,
            None => settings.default_tokens.unwrap_or(left).min(left),
        };
        Ok(Tokens { prompt, max_tokens })
    }

    fn encode(&self, text: &str, special: bool, param: &str) -> Result<Vec<u32>, ApiError> {
        Ok(self.tokenizer.encode(text, special).map_err(|error| refused(param, &error))?.ids)
    }

    fn known(&self, tokens: &[u32], param: &str) -> Result<Vec<u32>, ApiError> {
        match tokens.iter().position(|&token| token as usize >= self.vocab) {
            None => Ok(tokens.to_vec()),
            Some(at) => {
                let path = format!("{param}[{at}]");
                let message = format!(
                    "Invalid '{path}': token {} is not below the size of this model's vocabulary, {}.",
                    tokens[at], self.vocab
                );
                Err(ApiError::field(path, "invalid_value", message))
            }
        }
    }
}

fn refused(param: &str, error: &FileError) -> ApiError {
    ApiError::field(param, "invalid_value", format!("Invalid '{param}': {error}."))
}
