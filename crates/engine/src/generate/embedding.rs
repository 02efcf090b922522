//! From a hidden state to an embedding.

/// As PyTorch's `normalize`: a state of zeros stays one.
const EPSILON: f64 = 1e-12;

/// `state / |state|` (Euclidean), with the norm in f64 and in the order of the numbers; not finite where `state` is not.
pub(super) fn unit(state: &[f32]) -> Vec<f32> {
    let norm = state.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    // Not `max`, which drops NaN.
    let norm = if norm < EPSILON { EPSILON } else { norm };
    state.iter().map(|&x| (f64::from(x) / norm) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::unit;

    #[test]
    fn directions_stay_and_lengths_become_1() {
        assert_eq!(unit(&[3.0, 0.0, -4.0]), [0.6, 0.0, -0.8]);
        // Their squares are no f32.
        let large = 2f32.powi(100);
        assert_eq!(unit(&[3.0 * large, 4.0 * large]), [0.6, 0.8]);
        assert_eq!(unit(&[0.0, 0.0]), [0.0, 0.0]);
    }

    #[test]
    fn what_is_not_finite_is_not_hidden() {
        assert!(unit(&[f32::NAN, 1.0]).iter().all(|x| x.is_nan()));
        assert!(unit(&[f32::INFINITY, 1.0])[0].is_nan());
    }
}
