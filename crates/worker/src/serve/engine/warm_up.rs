//! Before the first request: one token.
use lathe_engine::{Generator, Sampling};

use crate::failure::{Done, Halt};

pub(super) const GREEDY: Sampling = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0 };

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
