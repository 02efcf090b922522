//! The dynamic tree code of 8 bits for moments: Dettmers et al., "8-bit Optimizers via Block-wise Quantization",
//! arXiv:2110.02861, with the values and the order of bitsandbytes' `create_dynamic_map`.
//!
//! Magnitudes are 0, the values of seven decades up to 1, and 1 itself. The decade `[0.1, 1] * 10^(d - 6)` has `2^d`
//! values (`2^(d + 1)` without a sign) in the middles of as many equal parts: large numbers are rounded finely, and small
//! ones are still there. What is coded is a number divided by the largest of its block.
//!
//! A magnitude's **place** makes a tree of it: the leading bit of the place is the decade, the bits below are the part.
//! So both ways are arithmetic of singles that compilers turn into vector code, which tables are not. It is rounded alike
//! at every level.
#![allow(unsafe_code)] // A conversion that is never out of range.

/// With a sign: of first moments.
pub(super) const SIGNED: Code = Code::new(true);

/// Without a sign: of second moments.
pub(super) const UNSIGNED: Code = Code::new(false);

const DECADES: usize = 7;

/// Upper ends of the decades.
const ENDS: [f32; DECADES] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];

/// Codes `zero - 127..=zero + 128`, or `0..=255`. Arrays are of the decades, and at last of the value 1.
pub(super) struct Code {
    /// The code of 0.
    zero: i32,
    /// The place of 0; other places are counted from it.
    base: i32,
    /// Places at which a decade begins: as many as it has parts.
    first: [f32; DECADES + 1],
    /// In the middle between a decade's first value and the one below; see [`Code::new`] for the lowest.
    limit: [f32; DECADES + 1],
    /// Parts of a decade by its length; none of the value 1.
    slope: [f32; DECADES + 1],
}

impl Code {
    const fn new(signed: bool) -> Code {
        let (zero, base) = if signed { (127, 0) } else { (0, 1) };
        let mut code = Code { zero, base, first: [0.0; 8], limit: [0.0; 8], slope: [0.0; 8] };
        let (mut below, mut decade) = (0.0, 0);
        while decade < DECADES {
            let (parts, end) = ((1 << (decade as i32 + base)) as f64, ENDS[decade] as f64);
            let least = end * (0.1 + 0.45 / parts);
            code.first[decade] = parts as f32;
            code.limit[decade] = if below == 0.0 && !signed {
                // A second moment does not become 0 (but below 1e-38 of the largest). As a square it would get there long before
                // the first moment, which would be divided by epsilon alone then.
                f32::MIN_POSITIVE
            } else {
                ((below + least) / 2.0) as f32
            };
            code.slope[decade] = (parts / (0.9 * end)) as f32;
            below = end * (1.0 - 0.45 / parts);
            decade += 1;
        }
        code.first[DECADES] = 2.0 * code.first[DECADES - 1];
        code.limit[DECADES] = ((below + 1.0) / 2.0) as f32;
        code
    }

    /// `x[..] = scale * value of codes[..]`.
    #[inline(always)]
    pub(super) fn decode(&self, codes: &[u8], scale: f32, x: &mut [f32]) {
        for (x, &code) in x.iter_mut().zip(codes) {
            *x = scale * self.value(code);
        }
    }

    /// Writes the codes of a block and returns its scale, the largest magnitude. Below the normal range a block is zero;
    /// infinity counts as the largest number, so that its neighbours stay numbers.
    #[inline(always)]
    pub(super) fn encode(&self, x: &[f32], codes: &mut [u8]) -> f32 {
        // Without the sign, bits are in the order of the numbers.
        let largest = x.iter().fold(0, |most, x| most.max(x.to_bits() & 0x7fff_ffff));
        let largest = f32::from_bits(largest.min(f32::MAX.to_bits()));
        let scale = if largest < f32::MIN_POSITIVE { 0.0 } else { largest };
        let by = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        for (code, x) in codes.iter_mut().zip(x) {
            *code = self.nearest(x * by);
        }
        scale
    }

    #[inline(always)]
    fn value(&self, code: u8) -> f32 {
        let signed = i32::from(code) - self.zero;
        let place = (signed.abs() + self.base) as f32;
        let mut end = 0.0;
        for (&first, at) in self.first.iter().zip(ENDS) {
            end = if place >= first { at } else { end };
        }
        // The part begins at `0.9 * (place / 2^d - 1)`; a power of two is divided by in the bits of its exponent.
        let power = place.to_bits() & 0xff80_0000;
        let part = (place + 0.5) * f32::from_bits((254 << 23) - power) - 1.0;
        let inside = end * (0.1 + 0.9 * part);
        let magnitude = if place >= self.first[DECADES] { 1.0 } else { inside };
        f32::from_bits(magnitude.to_bits() | (signed as u32 & 1 << 31))
    }

    /// The code of the value nearest to `x`, which is within +-1 (a hair more counts as that). The middle between two
    /// values is met to a few hundred-thousandths of the step between them.
    #[inline(always)]
    fn nearest(&self, x: f32) -> u8 {
        let magnitude = x.abs();
        let (mut first, mut slope) = (self.base as f32, 0.0);
        for ((&limit, &its_first), &its_slope) in self.limit.iter().zip(&self.first).zip(&self.slope) {
            let reached = magnitude >= limit;
            (first, slope) =
                (if reached { its_first } else { first }, if reached { its_slope } else { slope });
        }
        let place = magnitude * slope + first * (8.0 / 9.0);
        let last = 2.0 * first - 1.0;
        let place = if place < last { place } else { last };
        let place = if place > first { place } else { first };
        // SAFETY: within 0..=256, also where `x` is not a number.
        let place = unsafe { place.to_int_unchecked::<i32>() } - self.base;
        let sign = x.to_bits() as i32 >> 31;
        // With a sign, -1 is no value: it becomes the one above.
        (self.zero + ((place ^ sign) - sign)).max(0) as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(code: &Code) -> Vec<f32> {
        (0..=255).map(|byte| code.value(byte)).collect()
    }

    /// As bitsandbytes' Python: means of neighbouring boundaries in each decade, 0 and 1, sorted.
    fn create_dynamic_map(signed: bool) -> Vec<f64> {
        let mut map = vec![0.0, 1.0];
        for i in 0..7 {
            let parts = 2_i32.pow(if signed { i } else { i + 1 });
            let boundary = |at: i32| 0.1 + 0.9 * f64::from(at) / f64::from(parts);
            for part in 0..parts {
                let mean = (boundary(part) + boundary(part + 1)) / 2.0 * 10_f64.powi(i as i32 - 6);
                map.push(mean);
                map.extend(signed.then_some(-mean));
            }
        }
        map.sort_by(f64::total_cmp);
        map
    }

    #[test]
    fn values_are_those_of_bitsandbytes() {
        for (code, signed) in [(&SIGNED, true), (&UNSIGNED, false)] {
            let map = create_dynamic_map(signed);
            assert_eq!(map.len(), 256);
            for (ours, theirs) in values(code).into_iter().zip(map) {
                assert!(
                    (f64::from(ours) - theirs).abs() <= 2e-7 * theirs.abs(),
                    "{ours:e} is not {theirs:e}"
                );
            }
        }
    }

    /// All values, all middles between them with the singles around, and numbers of every size.
    #[test]
    fn the_nearest_value_is_found() {
        for (code, least) in [(&SIGNED, -1.0), (&UNSIGNED, 0.0)] {
            let values = values(code);
            let middles = values.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0);
            let near = middles
                .flat_map(|x| [-9, -1, 0, 1, 9].map(|off| f32::from_bits((x.to_bits() as i32 + off) as u32)));
            let sizes = (0..3_000_000_u32).map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b9)));
            let all = near.chain(values.iter().copied()).chain(sizes).chain([-1.0, 1.0]);
            for x in all.filter(|x| (least..=1.0).contains(x)) {
                let error = |value: &f32| (f64::from(*value) - f64::from(x)).abs();
                let best = values.iter().map(error).fold(f64::INFINITY, f64::min);
                let found = values[usize::from(code.nearest(x))];
                if code.zero == 0 && (f32::MIN_POSITIVE..values[1]).contains(&x) {
                    assert_eq!(found, values[1], "{x:e} is not 0");
                    continue;
                }
                assert!(error(&found) <= best * (1.0 + 1e-4), "{x:e} becomes {found:e}");
            }
            for (byte, value) in (0..=255).zip(values) {
                assert_eq!(code.nearest(value), byte);
            }
        }
    }

    #[test]
    fn blocks_of_what_is_hardly_a_number() {
        let mut codes = [9; 4];
        for x in [[0.0, -0.0, 0.0, 0.0], [1e-40, -1e-42, 0.0, 0.0]] {
            assert_eq!(SIGNED.encode(&x, &mut codes), 0.0);
            let mut back = [1.0; 4];
            SIGNED.decode(&codes, 0.0, &mut back);
            assert_eq!(back, [0.0; 4]);
        }
        assert_eq!(UNSIGNED.encode(&[1e-40; 4], &mut codes), 0.0);
        let scale = UNSIGNED.encode(&[f32::INFINITY, 1.0, 0.0, 3e38], &mut codes);
        let mut back = [0.0; 4];
        UNSIGNED.decode(&codes, scale, &mut back);
        assert!(back[0] > 0.99 * f32::MAX && back[0].is_finite() && back[1..3] == [0.0; 2], "{back:?}");
        let scale = SIGNED.encode(&[f32::MIN_POSITIVE, -f32::MIN_POSITIVE, 0.0, f32::NAN], &mut codes);
        assert_eq!((scale, codes[2]), (f32::MAX, 127));
        let scale = SIGNED.encode(&[f32::MIN_POSITIVE, -f32::MIN_POSITIVE, 0.0, 0.0], &mut codes);
        assert_eq!((scale, codes), (f32::MIN_POSITIVE, [255, 0, 127, 127]));
    }
}
