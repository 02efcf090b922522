//! The machine's limits, measured again and again between the other measurements.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use lathe_plan::Precision;
use serde::Serialize;
use serde_json::Value;

use super::stats::Figure;
use super::table::Table;
use crate::command::run;
use crate::images::programs;
use crate::paths;

/// Names of the figures, and how tables call them.
const FIGURES: [(&str, &str, &str); 9] = [
    ("read", "memory read", "GB/s"),
    ("portable", "f32, any processor", "GFLOP/s"),
    ("avx2", "f32, AVX2 FMA", "GFLOP/s"),
    ("avx512", "f32, AVX-512 FMA", "GFLOP/s"),
    ("avx512_bf16", "bf16, AVX512_BF16", "GFLOP/s"),
    ("amx", "bf16, AMX", "GFLOP/s"),
    ("int8_avx2", "int8, AVX2", "GOP/s"),
    ("int8_vnni", "int8, AVX512_VNNI", "GOP/s"),
    ("int8_amx", "int8, AMX", "GOP/s"),
];

/// The program that measures, and what it has found so far.
pub struct Limits {
    program: PathBuf,
    /// Of each figure: by the clock, by processor time.
    found: [[Vec<f64>; 2]; FIGURES.len()],
}

/// What shares are shares of: by the clock, and by processor time, which is what there would be if nothing else ran.
pub type Ceilings = [Ceiling; 2];

/// The limits of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ceiling {
    /// Bytes a second.
    pub read: f64,
    /// f32 operations a second.
    pub f32: f64,
    /// Operations a second on bf16 numbers: where the processor has none for them, those of f32.
    pub bf16: f64,
    /// Operations a second on bytes: where the processor has none for them, those of f32.
    pub int8: f64,
}

impl Limits {
    /// Compiles the program.
    ///
    /// # Errors
    /// The compiler refuses it.
    pub fn build() -> Result<Self> {
        let source = paths::repository().join("crates/xtask/programs/limits.rs");
        let program = programs::fast("limits", &source)?;
        Ok(Self { program, found: Default::default() })
    }

    /// Measures once more: some seconds.
    ///
    /// # Errors
    /// The program fails.
    pub fn measure(&mut self) -> Result<()> {
        let said: Value = serde_json::from_str(&run(&mut Command::new(&self.program))?)?;
        for ((name, ..), found) in FIGURES.iter().zip(&mut self.found) {
            for (way, found) in found.iter_mut().enumerate() {
                found.extend(said[name][way].as_f64());
            }
        }
        Ok(())
    }

    /// The medians until now.
    ///
    /// # Errors
    /// Nothing was measured.
    pub fn ceilings(&self) -> Result<Ceilings> {
        let of = |way: usize| -> Result<Ceiling> {
            let found = |name: &str| {
                let at = FIGURES.iter().position(|(figure, ..)| *figure == name)?;
                Some(Figure::of(self.found[at][way].clone())?.median * 1e9)
            };
            let most = |names: &[&str]| names.iter().filter_map(|name| found(name)).reduce(f64::max);
            let missing = "no limit was measured";
            let f32 = most(&["portable", "avx2", "avx512"]).context(missing)?;
            Ok(Ceiling {
                read: found("read").context(missing)?,
                f32,
                bf16: most(&["avx512_bf16", "amx"]).unwrap_or(f32).max(f32),
                int8: most(&["int8_avx2", "int8_vnni", "int8_amx"]).unwrap_or(f32).max(f32),
            })
        };
        Ok([of(0)?, of(1)?])
    }

    /// For people.
    pub fn table(&self) -> Table {
        let headings = ["What", "by the clock (range)", "by processor time (range)", "Unit"];
        let mut table = Table::new("Limits of the machine", &headings);
        for ((_, what, unit), found) in FIGURES.iter().zip(&self.found) {
            let shown = found.each_ref().map(|found| {
                Figure::of(found.clone()).map_or("not present".to_owned(), |figure| figure.shown())
            });
            let [clock, processor] = shown;
            table.rows.push(vec![(*what).to_owned(), clock, processor, (*unit).to_owned()]);
        }
        table.notes.push(format!(
            "All cores at once, measured {} times between the other measurements. By processor time: what it would be if nothing \
             else ran; of memory reads that is more than both cores reach together.",
            self.found[0][0].len()
        ));
        table
    }
}

impl Ceiling {
    /// Operations a second on weights of that precision.
    pub fn compute(&self, precision: Precision) -> f64 {
        match precision {
            Precision::F32 => self.f32,
            Precision::BF16 => self.bf16,
            Precision::Int8 | Precision::Int4 => self.int8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(rates: &[(&str, f64)]) -> Limits {
        let found = FIGURES.map(|(name, ..)| {
            let rates: Vec<f64> = rates.iter().filter(|(of, _)| *of == name).map(|(_, rate)| *rate).collect();
            [rates.clone(), rates.iter().map(|rate| rate * 2.0).collect()]
        });
        Limits { program: PathBuf::new(), found }
    }

    #[test]
    fn without_instructions_for_bf16_its_limit_is_that_of_f32() -> Result<()> {
        let plain =
            limits(&[("read", 20.0), ("read", 30.0), ("read", 25.0), ("portable", 5.0), ("avx2", 180.0)]);
        let [clock, processor] = plain.ceilings()?;
        assert_eq!(clock, Ceiling { read: 25e9, f32: 180e9, bf16: 180e9, int8: 180e9 });
        assert_eq!(processor, Ceiling { read: 50e9, f32: 360e9, bf16: 360e9, int8: 360e9 });
        assert_eq!(plain.table().rows[4][1], "not present");
        let rates =
            [("read", 20.0), ("avx2", 180.0), ("avx512", 400.0), ("amx", 6000.0), ("int8_vnni", 1600.0)];
        let [clock, _] = limits(&rates).ceilings()?;
        let all = [Precision::F32, Precision::BF16, Precision::Int8, Precision::Int4];
        assert_eq!(all.map(|precision| clock.compute(precision)), [400e9, 6000e9, 1600e9, 1600e9]);
        Ok(())
    }
}
