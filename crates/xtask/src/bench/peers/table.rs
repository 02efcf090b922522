//! One table for each model: ours, each peer, the ratio to the best of them, our share of the limit.

use lathe_plan::{ModelShape, Precision, TrainMethod};

use super::super::engine::lora;
use super::super::limits::Ceiling;
use super::super::models::Model;
use super::super::report::short;
use super::super::stats::{Figure, number, percent};
use super::super::table::Table;
use super::super::work;
use super::Row;
use super::contestant::CONTESTANTS;
use super::task::{Task, Unit};

/// How notes call a row.
pub fn label(precision: Precision, task: &Task) -> String {
    format!("{task}, {}", short(precision))
}

/// The table.
pub fn table(model: &Model, rows: &[Row], notes: Vec<String>, ceiling: &Ceiling, rounds: usize) -> Table {
    let names = CONTESTANTS.map(|contestant| contestant.name());
    let headings: Vec<&str> = [model.name]
        .into_iter()
        .chain(names)
        .chain(["ratio to the best peer", "share of the limit", "spread"])
        .collect();
    let mut table = Table::new(format!("{} beside its peers", model.name), &headings);
    for row in rows {
        let figures = row.runs.each_ref().map(|runs| Figure::of(runs.clone()));
        let mut cells = vec![format!("{}, {}", label(row.precision, &row.task), row.unit.name())];
        let cell =
            |figure: &Option<Figure>| figure.map_or("-".to_owned(), |figure| row.unit.shown(figure.median));
        cells.extend(figures.iter().map(cell));
        let (ours, best) = (figures[0], best(row.unit, &figures[1..]));
        let ratio = ours.zip(best).map(|(ours, best)| {
            if row.unit.more_is_better() { ours.median / best.median } else { best.median / ours.median }
        });
        cells.push(ratio.map_or("-".to_owned(), |ratio| format!("{} x", number(ratio))));
        let share = ours.filter(|_| row.unit == Unit::Rate);
        cells.push(
            share
                .and_then(|ours| share_of(&model.shape, row, ours.median, ceiling))
                .unwrap_or("-".to_owned()),
        );
        cells.push([ours, best].map(|figure| figure.map_or("-".to_owned(), spread)).join(" / "));
        table.rows.push(cells);
    }
    table.notes.push(format!(
        "Medians of {rounds} rounds; in a round each row is done by one engine after the other. Ratio: how many times better Lathe is \
         than the best peer. Share: of memory reads for decoding (weights as their format has them, keys and values of 16 bits), \
         of operations for the rest and where a batch needs more of these. Spread: largest less smallest, of the median, of Lathe / \
         of the best peer. int8 and int4 are Q8_0 and Q4_0 for the peers; OpenVINO reads F16 for bf16."
    ));
    table.notes.extend(notes);
    table
}

fn best(unit: Unit, figures: &[Option<Figure>]) -> Option<Figure> {
    let better = |one: Figure, other: Figure| {
        if (one.median > other.median) == unit.more_is_better() { one } else { other }
    };
    figures.iter().copied().flatten().reduce(better)
}

fn spread(figure: Figure) -> String {
    percent((figure.most - figure.least) / figure.median)
}

fn share_of(shape: &ModelShape, row: &Row, rate: f64, ceiling: &Ceiling) -> Option<String> {
    let compute = |flops: f64| rate * flops / ceiling.compute(row.precision);
    let operations = |share: f64| format!("{} of FLOP/s", percent(share));
    match row.task {
        Task::Prefill { tokens } => Some(operations(compute(work::prefill_flops(shape, tokens)))),
        Task::Train { full, length, .. } => {
            let method = if full { TrainMethod::Full } else { lora() };
            Some(operations(compute(work::training_flops(shape, &method, length))))
        }
        Task::Decode { batch, context, tokens } => {
            let cache = work::cache_bytes(shape, context + tokens / 2);
            let step = work::decode_bytes(shape, row.precision) + batch as f64 * cache;
            let reads = rate / batch as f64 * step / ceiling.read;
            // Every weight that is read is used for each sequence.
            let computed = compute(2.0 * work::decode_bytes(shape, Precision::F32) / 4.0);
            Some(if computed > reads { operations(computed) } else { format!("{} of reads", percent(reads)) })
        }
        Task::First => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::models::q05;
    use super::*;

    fn row(task: Task, unit: Unit, runs: [&[f64]; 5]) -> Row {
        Row { precision: Precision::BF16, task, unit, runs: runs.map(<[f64]>::to_vec) }
    }

    fn cells(row: Row) -> Vec<String> {
        let model = Model { name: "Q05", folder: Default::default(), shape: q05() };
        let ceiling = Ceiling { read: 28e9, f32: 180e9, bf16: 180e9, int8: 340e9 };
        table(&model, &[row], Vec::new(), &ceiling, 3).rows.remove(0)
    }

    #[test]
    fn the_ratio_is_to_the_best_peer_and_the_share_counts_the_cache() {
        let decode = Task::Decode { batch: 1, context: 32, tokens: 32 };
        let found =
            cells(row(decode, Unit::Rate, [&[22.0, 20.0, 21.0], &[10.0], &[], &[14.0, 7.0, 21.0], &[]]));
        let wanted = ["decode, batch 1, bf16, tokens/s", "21.0", "10.0", "-", "14.0", "-"];
        assert_eq!(found[..6], wanted);
        assert_eq!(found[6..], ["1.50 x", "74 % of reads", "10 % / 100 %"]);
        // At 8192 tokens the cache is a tenth of what is read.
        let long = Task::Decode { batch: 1, context: 8192, tokens: 32 };
        assert_eq!(cells(row(long, Unit::Rate, [&[21.0], &[], &[], &[], &[]]))[6..8], ["-", "82 % of reads"]);
    }

    #[test]
    fn of_seconds_and_bytes_less_is_better() {
        let found = cells(row(Task::First, Unit::Seconds, [&[0.5], &[4.0], &[], &[1.0], &[2.0]]));
        assert_eq!(found[6..8], ["2.00 x", "-"]);
    }
}
