//! Tables of what the engine did: figures, and shares of the machine's limits.

use anyhow::Result;
use lathe_plan::{ModelShape, Precision, TrainMethod};

use super::engine::{Held, PROMPT, ROW, Row, START, STEP_ROWS, lora};
use super::limits::{Ceiling, Ceilings};
use super::models::{demo, q05};
use super::stats::{bytes, number, percent};
use super::table::Table;
use super::work;

/// Tokens a second.
///
/// # Errors
/// The demo model's files are not what they should be.
pub fn speed(rows: &[Row], [clock, processor]: &Ceilings) -> Result<Table> {
    let headings = [
        "Model, weights",
        "What",
        "tokens/s (range)",
        "share of the limit",
        "cores busy",
        "tokens/s by processor time",
        "share of the limit",
    ];
    let mut table = Table::new("Training and serving", &headings);
    let demo = demo()?.shape;
    for row in rows {
        let mut cells = vec![format!("{}, {}", row.model, short(row.precision)), row.what.to_owned()];
        if row.what == START {
            cells.push(format!("{} s", number(row.rate.median)));
            cells.resize(headings.len(), "-".to_owned());
        } else {
            let shape = if row.model == "demo" { &demo } else { &q05() };
            cells.extend([
                row.rate.shown(),
                share(row, row.rate.median, shape, clock),
                number(row.cores),
                number(row.by_processor),
                share(row, row.by_processor, shape, processor),
            ]);
        }
        table.rows.push(cells);
    }
    table.notes.push(format!(
        "Training: rows of {ROW} tokens, {STEP_ROWS} a step, AdamW, no activations computed twice; LoRA of rank 16 on all seven \
         linear layers. Prefill: one prompt of {ROW} tokens (511 where the context is 512). Decode: greedy, after a prompt of \
         {PROMPT} tokens. By processor time: the tokens a second if the worker had had all cores for itself the whole time, beside \
         the limits by processor time. Serving is asked over HTTP, streamed; training is read from the worker's report."
    ));
    Ok(table)
}

/// How tables call it.
pub fn short(precision: Precision) -> &'static str {
    match precision {
        Precision::F32 => "f32",
        Precision::BF16 => "bf16",
        Precision::Int8 => "int8",
        Precision::Int4 => "int4",
    }
}

/// Of operations for what computes, of memory reads for what decodes; of a batch the larger of both.
fn share(row: &Row, rate: f64, shape: &ModelShape, ceiling: &Ceiling) -> String {
    let compute = |flops: f64| rate * flops / ceiling.compute(row.precision);
    let reads = |batch: f64| rate / batch * work::decode_bytes(shape, row.precision) / ceiling.read;
    // Every weight that is read is used for each sequence.
    let decode_flops = 2.0 * work::decode_bytes(shape, Precision::F32) / 4.0;
    match row.what {
        "LoRA training" => {
            format!("{} of FLOP/s", percent(compute(work::training_flops(shape, &lora(), ROW))))
        }
        "full training" => {
            format!("{} of FLOP/s", percent(compute(work::training_flops(shape, &TrainMethod::Full, ROW))))
        }
        "prefill" => format!("{} of FLOP/s", percent(compute(work::prefill_flops(shape, ROW)))),
        "decode, batch 1" => format!("{} of reads", percent(reads(1.0))),
        _ if compute(decode_flops) > reads(8.0) => format!("{} of FLOP/s", percent(compute(decode_flops))),
        _ => format!("{} of reads", percent(reads(8.0))),
    }
}

/// Peak memory beside the plan's.
pub fn memory(all: &[Held]) -> Table {
    let headings = ["Model, weights", "What", "planned", "held (VmHWM)", "held / planned", "of it own pages"];
    let mut table = Table::new("Peak memory", &headings);
    for Held { model, what, precision, planned, own, resident } in all {
        table.rows.push(vec![
            format!("{model}, {}", short(*precision)),
            (*what).to_owned(),
            bytes(*planned),
            bytes(*resident),
            number(*resident as f64 / *planned as f64),
            bytes(*own),
        ]);
    }
    table.notes.push(
        "Planned: the buffers that `crates/plan` lists, which the operator asks a profile for. Held is the whole process's: also \
         its code, tokenizer, runtime and stacks. Weights that are used where their file lies are not own pages: the kernel can \
         take them back."
            .to_owned(),
    );
    table
}

#[cfg(test)]
mod tests {
    use super::super::stats::Figure;
    use super::*;

    fn row(what: &'static str, rate: f64) -> Row {
        let rate = Figure { median: rate, least: rate, most: rate, runs: 1 };
        Row { model: "Q05", what, precision: Precision::BF16, rate, cores: 2.0, by_processor: 0.0 }
    }

    #[test]
    fn shares_are_of_what_binds() {
        let ceiling = Ceiling { read: 28e9, f32: 180e9, bf16: 180e9, int8: 340e9 };
        let of = |what, rate| share(&row(what, rate), rate, &q05(), &ceiling);
        assert_eq!(of("decode, batch 1", 22.7), "80 % of reads");
        // 0.988 GFLOP a token: at 182 tokens a second all multipliers are busy, and reads at 80 %.
        assert_eq!(of("decode, batch 8", 91.1), "50 % of FLOP/s");
        assert_eq!(of("prefill", 122.0), "50 % of FLOP/s");
        assert_eq!(of("LoRA training", 42.9), "50 % of FLOP/s");
        let slow = Ceiling { read: 5e9, ..ceiling };
        assert_eq!(share(&row("decode, batch 8", 20.0), 20.0, &q05(), &slow), "49 % of reads");
    }
}
