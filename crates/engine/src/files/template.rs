//! A model's chat template: messages to prompt text, and which parts of the text are the assistant's answers.
//!
//! A template is a program from a stranger. It runs in minijinja, which reaches neither files nor network, under a budget
//! ("fuel") that bounds time and, but for `~` on lists that were doubled again and again, memory: what that takes is
//! bounded by the limit of the process alone.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Write};
use std::ops::Range;
use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, Output, State, Value};
use serde::{Deserialize, Serialize};

use super::contain::with_deep_stack;
use super::error::{FileError, bounded, read_bounded};
use super::fields::{Fields, parse_json};

const CONFIG: &str = "tokenizer_config.json";
const MAX_CONFIG: u64 = 16 << 20;
/// The longest published templates have some 30 KB. The parser and the values recurse, which the stack must bear.
const MAX_TEMPLATE: u64 = 128 << 10;
/// An instruction or 64 bytes of text cost one each: at most 64 MB and about a tenth of a second.
const FUEL: u64 = 1_000_000;
const MAX_OUTPUT: usize = 16 << 20;
const NAME: &str = "chat";

/// A model's chat template with its special tokens.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token`, `eos_token` and the like, which templates write out.
    tokens: BTreeMap<&'static str, String>,
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`; templates refuse roles that they do not know.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// A conversation as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The whole text.
    pub text: String,
    /// Byte ranges of the assistant's answers, each with the tokens that end its turn.
    pub answers: Vec<Range<usize>>,
    /// Answers that could not be told apart because the template writes earlier turns differently once later ones
    /// follow (e.g. drops their reasoning).
    pub lost_answers: usize,
}

impl ChatTemplate {
    /// Reads `chat_template.jinja`, or else `chat_template` of `tokenizer_config.json`, of a model's folder. A model
    /// without one (a base model) gives none.
    ///
    /// # Errors
    /// A file that is too large or malformed, a template with a syntax error.
    pub fn read(dir: &Path) -> Result<Option<Self>, FileError> {
        let optional = |name: &str, limit| match read_bounded(&dir.join(name), limit) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(FileError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        };
        let config = optional(CONFIG, MAX_CONFIG)?;
        let source = optional("chat_template.jinja", MAX_TEMPLATE)?;
        Self::parse(config.as_deref(), source.as_deref())
    }

    /// As [`ChatTemplate::read`], from the files' text.
    ///
    /// # Errors
    /// As [`ChatTemplate::read`].
    pub fn parse(config: Option<&[u8]>, source: Option<&[u8]>) -> Result<Option<Self>, FileError> {
        bounded(CONFIG, config.unwrap_or_default(), MAX_CONFIG)?;
        bounded("chat_template.jinja", source.unwrap_or_default(), MAX_TEMPLATE)?;
        let config = parse_json(CONFIG, config.unwrap_or(b"{}"))?;
        let fields = Fields::new(CONFIG, &config)?;
        let source = match source {
            Some(bytes) => std::str::from_utf8(bytes)
                .map_err(|error| FileError::Template(format!("chat_template.jinja is not UTF-8: {error}")))?,
            None => match source_in_config(&fields)? {
                Some(source) => source,
                None => return Ok(None),
            },
        };
        let source = without_generation_tags(source);
        let tokens = special_tokens(&fields)?;
        with_deep_stack(move || {
            let mut environment = environment();
            environment
                .add_template_owned(NAME, source)
                .map_err(|error| FileError::Template(describe(&error)))?;
            Ok(Some(ChatTemplate { environment, tokens }))
        })
        .ok_or_else(broken)?
    }

    /// Writes a conversation as the model was taught to read it. `add_generation_prompt` ends it with the beginning of
    /// an assistant's turn. `now` is the time that templates print as today's date (in UTC).
    ///
    /// # Errors
    /// [`FileError::Refused`]: the template refuses the messages. [`FileError::Template`]: it fails, or exceeds its budget.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        now: jiff::Timestamp,
    ) -> Result<String, FileError> {
        with_deep_stack(|| self.render_here(messages, add_generation_prompt, now)).ok_or_else(broken)?
    }

    fn render_here(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        now: jiff::Timestamp,
    ) -> Result<String, FileError> {
        let failed = |error: Error| match is_refusal(&error) {
            true => FileError::Refused(describe(&error)),
            false => FileError::Template(describe(&error)),
        };
        let template = self.environment.get_template(NAME).map_err(failed)?;
        let mut context: BTreeMap<&str, Value> = BTreeMap::new();
        let turn =
            |m: &Message| Value::from_pairs([("role", m.role.as_str()), ("content", m.content.as_str())]);
        context.insert("messages", Value::from(messages.iter().map(turn).collect::<Vec<_>>()));
        context.insert("add_generation_prompt", Value::from(add_generation_prompt));
        // Templates test these for none.
        context.insert("tools", Value::from(()));
        context.insert("documents", Value::from(()));
        for (name, token) in &self.tokens {
            context.insert(name, Value::from(token.as_str()));
        }
        let clock = move |format: String| {
            jiff::fmt::strtime::format(&format, &now.to_zoned(jiff::tz::TimeZone::UTC))
                .map_err(|error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}")))
        };
        context.insert("strftime_now", Value::from_function(clock));
        let text = template.render(Value::from(context)).map_err(failed)?;
        if text.len() > MAX_OUTPUT {
            return Err(FileError::Template(format!(
                "wrote {} bytes; at most {MAX_OUTPUT} are allowed",
                text.len()
            )));
        }
        Ok(text)
    }

    /// Writes a whole conversation and finds the assistant's answers in it: an answer is what follows the prompt that
    /// asks for it, up to where the next turn begins.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_with_answers(
        &self,
        messages: &[Message],
        now: jiff::Timestamp,
    ) -> Result<Rendered, FileError> {
        let text = self.render(messages, false, now)?;
        let mut rendered = Rendered { text, answers: Vec::new(), lost_answers: 0 };
        for (turn, message) in messages.iter().enumerate() {
            if message.role != "assistant" {
                continue;
            }
            let start = self.render(&messages[..turn], true, now)?;
            let end = self.render(&messages[..=turn], false, now)?;
            if end.starts_with(&start) && rendered.text.starts_with(&end) {
                rendered.answers.push(start.len()..end.len());
            } else {
                rendered.lost_answers += 1;
            }
        }
        Ok(rendered)
    }
}

/// The language as transformers sets it up: blocks swallow their line, Python's methods on strings, lists and maps.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    if let Ok(syntax) = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
        environment.set_syntax(syntax);
    }
    environment.set_fuel(Some(FUEL));
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(method);
    environment.set_formatter(print);
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message).with_source(Refusal))
    });
    environment
}

/// Marks what a template says by `raise_exception`: it works, and does not take these messages.
#[derive(Debug, thiserror::Error)]
#[error("raised by the template")]
struct Refusal;

fn is_refusal(error: &Error) -> bool {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if error.is::<Refusal>() {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Python's methods. `format` makes a text as wide as it is told to, so its numbers are paid for beforehand.
fn method(state: &mut State, value: &Value, name: &str, arguments: &[Value]) -> Result<Value, Error> {
    if let ("format", Some(text)) = (name, value.as_str()) {
        let widths = text.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
        let widths = widths.map(|digits| digits.parse::<u64>().unwrap_or(u64::MAX));
        let given = arguments.iter().flat_map(numbers);
        let bytes = widths.chain(given).fold(0, u64::saturating_add);
        state.consume_fuel(bytes / 64)?;
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, arguments)
}

/// A whole number among the arguments, or among named ones.
fn numbers(value: &Value) -> Vec<u64> {
    let number = |value: &Value| i64::try_from(value.clone()).ok().map(i64::unsigned_abs);
    let named = value.as_object().and_then(|object| object.try_iter_pairs());
    named.map_or_else(
        || number(value).into_iter().collect(),
        |pairs| pairs.filter_map(|(_, value)| number(&value)).collect(),
    )
}

/// Prints a value, of which a list that holds itself twice, and that again, has more text than any memory.
fn print(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    let mut text = Bounded { out: Vec::new(), full: false };
    match value.as_str() {
        Some(text) => out.write_str(text)?,
        None => {
            let done = fmt::Write::write_fmt(&mut text, format_args!("{value}"));
            if text.full {
                return Err(Error::from(ErrorKind::OutOfFuel));
            }
            done?;
            state.consume_fuel(text.out.len() as u64 / 64)?;
            out.write_str(&String::from_utf8_lossy(&text.out))?;
        }
    }
    Ok(())
}

/// Takes as much as a prompt may be long.
struct Bounded {
    out: Vec<u8>,
    full: bool,
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.full |= self.out.len() + bytes.len() > MAX_OUTPUT;
        if self.full {
            return Err(io::Error::from(io::ErrorKind::FileTooLarge));
        }
        self.out.extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl fmt::Write for Bounded {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.write_all(text.as_bytes()).map_err(|_| fmt::Error)
    }
}

/// `chat_template` is a string, or a list of named ones of which `default` is for plain chats.
fn source_in_config<'a>(fields: &Fields<'a>) -> Result<Option<&'a str>, FileError> {
    let allowed = "a string, or a list of {name, template} with the name \"default\"";
    let Some(value) = fields.get("chat_template") else { return Ok(None) };
    let source = match value.as_array() {
        None => value.as_str(),
        Some(list) => {
            list.iter().find(|entry| entry["name"] == "default").and_then(|entry| entry["template"].as_str())
        }
    };
    let source = source.ok_or_else(|| fields.wrong("chat_template", allowed))?;
    if source.len() as u64 > MAX_TEMPLATE {
        return Err(fields.wrong("chat_template", format!("at most {MAX_TEMPLATE} bytes")));
    }
    Ok(Some(source))
}

/// A special token is a string, or an object whose `content` is one.
fn special_tokens(fields: &Fields) -> Result<BTreeMap<&'static str, String>, FileError> {
    let mut tokens = BTreeMap::new();
    for name in ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"] {
        let Some(value) = fields.get(name) else { continue };
        let text = value.as_str().or_else(|| value.get("content")?.as_str());
        tokens.insert(name, text.ok_or_else(|| fields.wrong(name, "a string"))?.to_owned());
    }
    Ok(tokens)
}

/// transformers' `{% generation %}` marks answers; here prefixes find them, so the tags become an `if` that is always
/// taken, which leaves white space as it is.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let end = tag.find("%}").map_or(tag.len(), |end| end + 2);
        let (tag, after) = tag.split_at(end);
        let inner = tag.trim_start_matches("{%").trim_end_matches("%}");
        match inner.trim_matches(['-', '+']).trim() {
            "generation" => out.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// Python's `json.dumps(ensure_ascii=False)`, as transformers' filter: no HTML escapes, spaces after `,` and `:`.
fn to_json(state: &State, value: Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    // Known to Python's function; what they change does not matter for the values that templates print.
    let _: (Option<Value>, Option<Value>, Option<Value>) =
        (options.get("ensure_ascii")?, options.get("separators")?, options.get("sort_keys")?);
    options.assert_all_used()?;
    let mut out = Bounded { out: Vec::new(), full: false };
    let done = match indent {
        Some(width) => {
            let spaces = " ".repeat(width.min(16));
            let format = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, format))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced)),
    };
    if out.full {
        return Err(Error::from(ErrorKind::OutOfFuel));
    }
    done.map_err(|error| Error::new(ErrorKind::BadSerialization, format!("tojson: {error}")))?;
    state.consume_fuel(out.out.len() as u64 / 64)?;
    String::from_utf8(out.out).map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))
}

/// JSON with Python's separators.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

fn broken() -> FileError {
    FileError::Template("cannot be run; simplify it".to_owned())
}

/// One line: what went wrong and where.
fn describe(error: &Error) -> String {
    let line = error.line().map_or_else(String::new, |line| format!(" (line {line})"));
    let text = match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => "takes more than its budget of time and memory".to_owned(),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    format!("{text}{line}")
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}\
        {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::parse(None, Some(source.as_bytes())).unwrap().unwrap()
    }

    fn now() -> jiff::Timestamp {
        "2024-07-26T12:30:00Z".parse().unwrap()
    }

    fn say(turns: &[(&str, &str)]) -> Vec<Message> {
        turns
            .iter()
            .map(|(role, content)| Message { role: (*role).into(), content: (*content).into() })
            .collect()
    }

    #[test]
    fn answers_are_found_with_the_end_of_their_turn() {
        let chat = say(&[("user", "hi"), ("assistant", "hé"), ("user", "and?"), ("assistant", "yes")]);
        let rendered = template(CHATML).render_with_answers(&chat, now()).unwrap();
        let answers: Vec<_> = rendered.answers.iter().map(|range| &rendered.text[range.clone()]).collect();
        assert_eq!(answers, ["hé<|im_end|>\n", "yes<|im_end|>\n"]);
        assert_eq!(rendered.lost_answers, 0);
    }

    #[test]
    fn an_answer_that_the_template_rewrites_later_is_counted_as_lost() {
        let source = "{% for m in messages %}[{{ m.content if loop.last else m.content|upper }}]{% endfor %}";
        let chat = say(&[("user", "1"), ("assistant", "a"), ("user", "2"), ("assistant", "b")]);
        let rendered = template(source).render_with_answers(&chat, now()).unwrap();
        assert_eq!(rendered.text, "[1][A][2][b]");
        assert_eq!(rendered.answers.first(), Some(&(9..12)));
        assert_eq!((rendered.answers.len(), rendered.lost_answers), (1, 1));
    }

    #[test]
    fn generation_tags_change_nothing() {
        let tagged = "a\n{%- generation -%}\n b {{ messages[0].content }}\n{% endgeneration %}\nc {% if x %}{% endif %}";
        assert_eq!(template(tagged).render(&say(&[("user", "hi")]), false, now()).unwrap(), "ab hi\nc ");
    }

    #[test]
    fn the_default_of_several_templates_is_taken_with_the_special_tokens() {
        let config = r#"{"chat_template": [{"name": "tools", "template": "T"},
            {"name": "default", "template": "{{ bos_token }}{{ eos_token }}{{ strftime_now('%d %b %Y') }}"}],
            "bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}}"#;
        let template = ChatTemplate::parse(Some(config.as_bytes()), None).unwrap().unwrap();
        assert_eq!(template.render(&[], false, now()).unwrap(), "<s></s>26 Jul 2024");
    }

    #[test]
    fn a_model_without_a_template_has_none() {
        assert!(ChatTemplate::parse(Some(b"{}"), None).unwrap().is_none());
        assert!(ChatTemplate::parse(None, None).unwrap().is_none());
    }

    #[rstest]
    #[case::at_once("{{ raise_exception('roles must alternate') }}")]
    #[case::in_a_macro("{% macro f() %}{{ raise_exception('roles must alternate') }}{% endmacro %}{{ f() }}")]
    fn a_refusal_is_told_apart_from_a_fault_of_the_template(#[case] source: &str) {
        let error = template(source).render(&say(&[("user", "hi")]), false, now()).unwrap_err();
        assert!(
            matches!(&error, FileError::Refused(says) if says.contains("roles must alternate")),
            "{error}"
        );
    }

    #[rstest]
    #[case::endless(
        "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
        "budget"
    )]
    #[case::huge("{{ 'x' * 10000000000 }}", "budget")]
    #[case::nested(
        "{% set ns = namespace(s='xx') %}{% for i in range(64) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "budget"
    )]
    #[case::doubled_and_printed(
        "{% set ns = namespace(l=[1]) %}{% for i in range(40) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
        "budget"
    )]
    #[case::doubled_as_json(
        "{% set ns = namespace(l=[1]) %}{% for i in range(40) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l|tojson }}",
        "budget"
    )]
    #[case::wide("{{ '{:>3000000000}'.format('a') }}", "budget")]
    #[case::wide_by_a_number("{{ '{:>{}}'.format('a', 3000000000) }}", "budget")]
    #[case::wide_by_a_name("{{ '{:>{w}}'.format('a', w=3000000000) }}", "budget")]
    #[case::recursion("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion")]
    #[case::include("{% include '/etc/passwd' %}", "not found")]
    #[case::clock("{{ strftime_now('%') }}", "strftime_now")]
    fn a_bad_template_is_an_error(#[case] source: &str, #[case] says: &str) {
        let error = template(source).render(&say(&[("user", "hi")]), false, now()).unwrap_err();
        assert!(matches!(error, FileError::Template(_)), "{error:?}");
        let error = error.to_string();
        assert!(error.starts_with("chat template: ") && error.contains(says), "{error}");
    }

    #[test]
    fn what_is_no_text_prints_as_ever() {
        let source =
            "{{ 1 }} {{ true }} {{ [1, 'a'] }} {{ nothing }}{{ '{:>4}'.format(7) }} {{ {'a': 1}|tojson }}";
        assert_eq!(template(source).render(&[], false, now()).unwrap(), "1 True [1, 'a']    7 {\"a\": 1}");
    }

    #[test]
    fn a_syntax_error_is_found_when_the_model_is_opened() {
        let error = ChatTemplate::parse(None, Some(b"a\n{% for %}")).unwrap_err().to_string();
        assert!(error.contains("(line 2)"), "{error}");
        assert!(ChatTemplate::parse(Some(br#"{"chat_template": 3}"#), None).is_err());
    }
}
