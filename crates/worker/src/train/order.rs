//! Which rows each optimizer step takes: a fresh order every epoch, the same for the same seed, forever.
//!
//! Rows are never split. An epoch's batches are evened out, so that no small rest is left over for a step of its own:
//! such a step would move the weights as far as a whole one, on the word of a few rows.

/// How long to go on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Extent {
    /// Passes over the rows; a part of the last one is rounded up to whole steps.
    Epochs(f64),
    /// Optimizer steps.
    Steps(u64),
}

/// The endless sequence of batches.
#[derive(Clone, Debug)]
pub struct Order {
    lengths: Vec<usize>,
    batch_tokens: usize,
    seed: u64,
    epoch: u64,
    /// Batches of the epoch, as row indices.
    batches: Vec<Vec<usize>>,
    /// Next batch of the epoch.
    next: usize,
}

impl Order {
    /// Rows of these lengths in batches of at most `batch_tokens` (one row may be longer: it is a batch of its own).
    /// There must be a row.
    pub fn new(lengths: Vec<usize>, batch_tokens: usize, seed: u64) -> Self {
        let mut order = Order { lengths, batch_tokens, seed, epoch: 0, batches: Vec::new(), next: 0 };
        order.batches = order.epoch_batches(0);
        order
    }

    /// Steps until the extent is reached, at least one.
    pub fn steps(&self, extent: Extent) -> u64 {
        let epochs = match extent {
            Extent::Steps(steps) => return steps.max(1),
            Extent::Epochs(epochs) => epochs.max(0.0),
        };
        let whole = epochs.floor() as u64;
        let mut steps: u64 = (0..whole).map(|epoch| self.epoch_batches(epoch).len() as u64).sum();
        let rest = epochs - epochs.floor();
        if rest > 0.0 {
            steps += (self.epoch_batches(whole).len() as f64 * rest).ceil() as u64;
        }
        steps.max(1)
    }

    /// The rows of the next step.
    pub fn next_batch(&mut self) -> Vec<usize> {
        if self.next == self.batches.len() {
            self.epoch += 1;
            self.batches = self.epoch_batches(self.epoch);
            self.next = 0;
        }
        let batch = std::mem::take(&mut self.batches[self.next]);
        self.next += 1;
        batch
    }

    /// Passes over the batches of steps that are done already.
    pub fn skip(&mut self, steps: u64) {
        for _ in 0..steps {
            self.next_batch();
        }
    }

    fn epoch_batches(&self, epoch: u64) -> Vec<Vec<usize>> {
        let rows = shuffled(self.lengths.len(), mix(self.seed, epoch));
        let total: usize = self.lengths.iter().sum();
        let count = total.div_ceil(self.batch_tokens).max(1);
        let share = total.div_ceil(count);
        let (mut batches, mut batch, mut tokens, mut taken) = (Vec::new(), Vec::new(), 0, 0);
        for row in rows {
            let length = self.lengths[row];
            let full = tokens + length > self.batch_tokens || taken >= share * (batches.len() + 1);
            if full && !batch.is_empty() {
                batches.push(std::mem::take(&mut batch));
                tokens = 0;
            }
            batch.push(row);
            tokens += length;
            taken += length;
        }
        batches.push(batch);
        batches
    }
}

/// The numbers below `len` in an order that the key alone decides (Fisher and Yates).
fn shuffled(len: usize, key: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..len).collect();
    for last in (1..len).rev() {
        let random = u128::from(mix(key, last as u64));
        let at = (random * (last as u128 + 1)) >> 64;
        order.swap(last, at as usize);
    }
    order
}

/// A random number for each pair: the finalizer of SplitMix64 (<https://doi.org/10.1145/2714064.2660195>), twice.
fn mix(key: u64, counter: u64) -> u64 {
    let finish = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    finish(finish(key.wrapping_add(GOLDEN)).wrapping_add(counter.wrapping_add(1).wrapping_mul(GOLDEN)))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn epoch(order: &mut Order, batches: usize) -> Vec<usize> {
        (0..batches).flat_map(|_| order.next_batch()).collect()
    }

    #[test]
    fn every_epoch_takes_every_row_once_in_another_order() {
        let mut order = Order::new(vec![10; 95], 100, 42);
        let (first, second) = (epoch(&mut order, 10), epoch(&mut order, 10));
        assert_ne!(first, second);
        for mut rows in [first, second] {
            rows.sort_unstable();
            assert_eq!(rows, (0..95).collect::<Vec<_>>());
        }
    }

    #[test]
    fn seeds_decide_the_order_and_nothing_else_does() {
        let rows = |seed| epoch(&mut Order::new(vec![10; 50], 100, seed), 5);
        assert_eq!(rows(1), rows(1));
        assert_ne!(rows(1), rows(2));
    }

    #[test]
    fn a_resumed_order_goes_on_where_it_stood() {
        let lengths: Vec<usize> = (0..73).map(|i| 5 + i % 17).collect();
        let mut whole = Order::new(lengths.clone(), 64, 7);
        let all: Vec<_> = (0..50).map(|_| whole.next_batch()).collect();
        for done in [0, 1, 17, 40] {
            let mut resumed = Order::new(lengths.clone(), 64, 7);
            resumed.skip(done);
            assert_eq!(resumed.next_batch(), all[done as usize]);
        }
    }

    #[test]
    fn batches_keep_the_limit_and_leave_no_small_rest() {
        let lengths: Vec<usize> = (0..205).map(|i| 8 + i % 5).collect();
        let total: usize = lengths.iter().sum();
        let order = Order::new(lengths.clone(), 1000, 3);
        let sizes: Vec<usize> =
            order.batches.iter().map(|batch| batch.iter().map(|&row| lengths[row]).sum()).collect();
        assert_eq!(sizes.iter().sum::<usize>(), total);
        assert_eq!(sizes.len(), 3, "{sizes:?}");
        assert!(sizes.iter().all(|&size| (600..=1000).contains(&size)), "{sizes:?}");
    }

    #[test]
    fn a_row_longer_than_a_batch_is_a_batch() {
        let order = Order::new(vec![300, 10, 10], 100, 0);
        assert!(order.batches.contains(&vec![0]), "{:?}", order.batches);
        assert!(order.batches.iter().all(|batch| !batch.is_empty()));
    }

    #[rstest]
    #[case(Extent::Epochs(3.0), 30)]
    #[case(Extent::Epochs(0.25), 3)]
    #[case(Extent::Epochs(1.01), 11)]
    #[case(Extent::Epochs(0.0), 1)]
    #[case(Extent::Steps(7), 7)]
    #[case(Extent::Steps(0), 1)]
    fn steps_of_an_extent(#[case] extent: Extent, #[case] steps: u64) {
        assert_eq!(Order::new(vec![10; 100], 100, 0).steps(extent), steps);
    }
}
