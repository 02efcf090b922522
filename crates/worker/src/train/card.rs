//! The model card of what training made: a `README.md` whose front matter the Hugging Face hub and PEFT read.
//!
//! It tells what decides the result and what was measured, never when or where, so that the same training gives the same
//! bytes.
use std::fmt::Write;

use lathe_contract::{OptimizerState, Score, TrainMethod, TrainTask};
use lathe_source::CardLicense;

/// What a card tells.
#[derive(Debug)]
pub struct Card<'a> {
    /// The base, by its name on the hub or in the cluster.
    pub base: &'a str,
    /// `sha256:<hex>` of the base's files.
    pub base_digest: &'a str,
    /// The base's licence, which goes on to what is made of it.
    pub license: Option<CardLicense>,
    /// `sha256:<hex>` of the rows.
    pub dataset_digest: &'a str,
    /// What was asked.
    pub task: &'a TrainTask,
    /// Optimizer steps that were done.
    pub steps: i64,
    /// Tokens that were seen.
    pub tokens: i64,
    /// Measurements on the held-out rows.
    pub scores: &'a [Score],
}

impl Card<'_> {
    /// The text of `README.md`.
    pub fn text(&self) -> String {
        let lora = matches!(self.task.method, TrainMethod::Lora(_));
        let (relation, library, what) = if lora {
            ("adapter", "peft", "A LoRA adapter")
        } else {
            ("finetune", "transformers", "All weights, tuned,")
        };
        let mut front = format!("base_model: {}\nbase_model_relation: {relation}\n", quoted(self.base));
        front += &format!("library_name: {library}\npipeline_tag: text-generation\n");
        if let Some(CardLicense { license, name, link }) = &self.license {
            let lines = [
                ("license", Some(license)),
                ("license_name", name.as_ref()),
                ("license_link", link.as_ref()),
            ];
            for (key, value) in lines {
                front.extend(value.map(|value| format!("{key}: {}\n", quoted(value))));
            }
        }
        front += &format!("tags:\n- {}\n", quoted(&format!("base_model:{relation}:{}", self.base)));
        front += if lora { "- lora\n- lathe\n" } else { "- lathe\n" };
        let scores = self.scores_table();
        let base = self.base.replace('`', "'");
        format!(
            "---\n{front}---\n# {what} of `{base}`\n\nMade by supervised fine-tuning with Lathe. The licence of the base \
             applies to it.\n{scores}\n## Training\n\n{}",
            self.training_table()
        )
    }

    fn scores_table(&self) -> String {
        if self.scores.is_empty() {
            return String::new();
        }
        let mut text =
            "\n## Scores on held-out rows\n\n| Metric | Base | Tuned |\n| --- | ---: | ---: |\n".to_owned();
        for score in self.scores {
            let value = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.4}"));
            let (before, after) = (value(score.before), value(score.after));
            // Writing to a string cannot fail, here and below.
            let _ = writeln!(text, "| {} | {before} | {after} |", score.metric.as_str());
        }
        text
    }

    fn training_table(&self) -> String {
        let set = &self.task.training;
        let optimizer = match set.optimizer_state {
            OptimizerState::Float32 => "AdamW",
            OptimizerState::Int8 => "AdamW, moments of 8 bits",
        };
        let mut rows = vec![
            ("Base", self.base_digest.to_owned()),
            ("Rows", self.dataset_digest.to_owned()),
            ("Steps", self.steps.to_string()),
            ("Tokens", self.tokens.to_string()),
            ("Optimizer", optimizer.to_owned()),
            ("Learning rate", format!("{:e}", set.learning_rate)),
            ("Schedule", format!("{:?}, warm-up {}", set.schedule, set.warmup)),
            ("Weight decay", set.weight_decay.to_string()),
            ("Gradient norm, at most", set.max_grad_norm.to_string()),
            ("Tokens of a step, at most", set.batch_tokens.to_string()),
            ("Tokens of a row, at most", set.sequence_length.to_string()),
            ("Seed", set.seed.to_string()),
        ];
        match &self.task.method {
            TrainMethod::Full {} => rows.push(("Method", "all weights".to_owned())),
            TrainMethod::Lora(lora) => {
                let scale =
                    format!("LoRA, rank {}, alpha {}, dropout {}", lora.rank, lora.alpha, lora.dropout);
                rows.push(("Method", scale));
                rows.push(("Targets", lora.targets.join(", ")));
            }
        }
        let mut text = "| Setting | Value |\n| --- | --- |\n".to_owned();
        for (name, value) in rows {
            let _ = writeln!(text, "| {name} | {value} |");
        }
        text
    }
}

/// A YAML scalar that stays one whatever it holds: JSON's strings are YAML's.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use lathe_contract::Metric;
    use serde_json::json;

    use super::*;

    fn task(method: serde_json::Value) -> TrainTask {
        let place = json!({"uri": "pvc://data/x"});
        serde_json::from_value(json!({
            "attempt": 1,
            "base": {"name": "b", "source": place},
            "dataset": {"train": place, "format": "Auto"},
            "method": method,
            "training": {"epochs": 2.0, "learningRate": 2e-4, "schedule": "Cosine", "warmup": 0.1, "batchTokens": 64,
                "microBatchTokens": 64, "sequenceLength": 32, "weightDecay": 0.0, "maxGradNorm": 1.0, "seed": 7},
            "checkpoint": {"intervalSeconds": 60, "keep": 2, "destination": place},
            "evaluation": {"metrics": ["Perplexity"], "gates": []},
            "output": {"modelName": "m", "destination": place},
        }))
        .unwrap()
    }

    fn text(method: serde_json::Value, license: Option<CardLicense>, base: &str) -> String {
        let task = task(method);
        let scores = [Score { metric: Metric::Perplexity, before: Some(4.5), after: Some(1.25) }];
        let card = Card {
            base,
            base_digest: "sha256:b",
            license,
            dataset_digest: "sha256:d",
            task: &task,
            steps: 12,
            tokens: 3456,
            scores: &scores,
        };
        card.text()
    }

    #[test]
    fn an_adapters_card_has_pefts_metadata_and_how_it_was_made() {
        let lora = json!({"lora": {"rank": 4, "alpha": 8, "dropout": 0.05, "targets": ["q_proj", "v_proj"],
            "basePrecision": "BFloat16"}});
        let own =
            CardLicense { license: "other".into(), name: Some("own".into()), link: Some("LICENSE".into()) };
        let text = text(lora, Some(own), "org/base");
        let front = "---\nbase_model: \"org/base\"\nbase_model_relation: adapter\nlibrary_name: peft\n\
            pipeline_tag: text-generation\nlicense: \"other\"\nlicense_name: \"own\"\nlicense_link: \"LICENSE\"\n\
            tags:\n- \"base_model:adapter:org/base\"\n- lora\n- lathe\n---\n# A LoRA adapter of `org/base`\n";
        assert!(text.starts_with(front), "{text}");
        for line in [
            "| Perplexity | 4.5000 | 1.2500 |",
            "| Rows | sha256:d |",
            "| Learning rate | 2e-4 |",
            "| Method | LoRA, rank 4, alpha 8, dropout 0.05 |",
            "| Targets | q_proj, v_proj |",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in {text}");
        }
        // The source reads back what it gave.
        assert_eq!(lathe_source::card_license(text.as_bytes()).and_then(|l| l.name).as_deref(), Some("own"));
    }

    #[test]
    fn whole_weights_are_of_transformers_and_a_name_cannot_add_keys() {
        let text = text(json!({"full": {}}), None, "a\"\nlicense: mit");
        assert!(text.contains("base_model_relation: finetune\nlibrary_name: transformers\n"), "{text}");
        assert!(text.contains("| Optimizer | AdamW |"), "{text}");
        assert_eq!(lathe_source::card_license(text.as_bytes()), None);
    }
}
