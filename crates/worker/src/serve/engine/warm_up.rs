//! Before the first request: one token, and how many there can be.
use std::time::{Duration, Instant};

use lathe_engine::{Generator, Sampling};

use crate::failure::{Done, Halt};

const GREEDY: Sampling = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0 };
/// Steps that are measured, at most, and the time for them.
const STEPS: usize = 16;
const TIME: Duration = Duration::from_secs(1);

/// Produces one token, so that whoever is told of readiness finds an engine that works.
///
/// # Errors
/// The engine's, or no token came.
pub fn warm_up(generator: &mut Generator) -> Done<()> {
    generator.add_sequence(0, &[0], None, GREEDY, 1)?;
    while !generator.idle() {
        if let Some(token) = generator.step()?.iter().find(|token| token.sequence == 0) {
            if token.log_prob.is_finite() {
                return Ok(());
            }
            let what = "`spec.modelRef`: the model's first answer is not a finite number: its weights hold NaN or infinity";
            return Err(Halt::user("MalformedModel", what, "serve another checkpoint of the model"));
        }
    }
    let next = "report this to Lathe's maintainers";
    Err(Halt::transient("EngineFailed", "the warm-up token did not come", next))
}

/// Tokens a second of a full batch of short answers, by a measurement of about a second at most.
///
/// # Errors
/// The engine's.
pub fn capacity(generator: &mut Generator, sequences: usize) -> Done<f64> {
    let ids = 1..=sequences as u64;
    for id in ids.clone() {
        // One token where the context has room for no more; then nothing is measured.
        generator.add_sequence(id, &[0], None, GREEDY, STEPS + 1)?;
    }
    // The prompts' step is another kind of work.
    generator.step()?;
    let start = Instant::now();
    let mut tokens = 0;
    for _ in 0..STEPS {
        tokens += generator.step()?.len();
        if start.elapsed() > TIME || generator.idle() {
            break;
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    ids.for_each(|id| generator.remove(id));
    Ok(if tokens > 0 { tokens as f64 / seconds.max(1e-6) } else { 0.0 })
}
