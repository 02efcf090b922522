//! The blocks of the key and value cache: who holds them, and whose beginnings they keep.
//!
//! A full block never changes again, so sequences that begin alike hold the same blocks. What a block holds is known by its
//! tokens and by what comes before them, compared in full: no hash can give one prompt the keys and values of another. A
//! block that nobody holds any more keeps what it has until its room is needed; the one that was left first goes first, and
//! of one sequence its end before its beginning.

use std::collections::{BTreeMap, HashMap};

use lathe_plan::BLOCK;

use super::AdapterId;

/// What comes before a block's tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Before {
    /// Nothing: they begin a sequence, which this adapter computes.
    Start(Option<AdapterId>),
    /// What a block holds, by the number that was given to it; no number is ever given again.
    Content(u64),
}

type Content = (Before, [u32; BLOCK]);

#[derive(Debug, Default)]
struct Block {
    holders: usize,
    /// What it holds, where it can be found by that, and the number of it.
    content: Option<(Content, u64)>,
    /// When it was left, where nobody holds it.
    left: u64,
}

/// All blocks, by number.
#[derive(Debug)]
pub(super) struct Blocks {
    blocks: Vec<Block>,
    /// Nobody holds them, and they keep nothing.
    blank: Vec<u32>,
    /// Nobody holds them, by when they were left.
    kept: BTreeMap<u64, u32>,
    by_content: HashMap<Content, u32>,
    /// The next number of a content, and the next moment.
    next: u64,
}

impl Blocks {
    pub(super) fn new(total: usize) -> Blocks {
        Blocks {
            blocks: (0..total).map(|_| Block::default()).collect(),
            blank: (0..total as u32).rev().collect(),
            kept: BTreeMap::new(),
            by_content: HashMap::new(),
            next: 0,
        }
    }

    pub(super) fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Those that nobody holds.
    pub(super) fn free(&self) -> usize {
        self.blank.len() + self.kept.len()
    }

    /// The blocks that keep the beginning of `tokens`, and what comes after the last of them.
    pub(super) fn find(&self, start: Before, tokens: &[u32]) -> (Vec<u32>, Before) {
        let (mut found, mut before) = (Vec::new(), start);
        for tokens in tokens.as_chunks::<BLOCK>().0 {
            let Some(&block) = self.by_content.get(&(before, *tokens)) else { break };
            let Some((_, number)) = self.blocks[block as usize].content else { break };
            found.push(block);
            before = Before::Content(number);
        }
        (found, before)
    }

    /// How many of `blocks` have so many holders.
    pub(super) fn held_by(&self, holders: usize, blocks: &[u32]) -> usize {
        blocks.iter().filter(|&&block| self.blocks[block as usize].holders == holders).count()
    }

    /// One more sequence holds blocks that were found.
    pub(super) fn hold(&mut self, found: &[u32]) {
        for &block in found {
            let Block { holders, left, .. } = &mut self.blocks[block as usize];
            if *holders == 0 {
                self.kept.remove(left);
            }
            *holders += 1;
        }
    }

    /// Moves `count` free blocks to `to`, of which there are as many; what they kept is forgotten.
    pub(super) fn take(&mut self, count: usize, to: &mut Vec<u32>) {
        for _ in 0..count {
            let oldest = || self.kept.pop_first().map(|(_, block)| block);
            let Some(number) = self.blank.pop().or_else(oldest) else {
                debug_assert!(false, "more blocks are planned than are free");
                return;
            };
            let block = &mut self.blocks[number as usize];
            block.holders = 1;
            if let Some((content, _)) = block.content.take() {
                self.by_content.remove(&content);
            }
            to.push(number);
        }
    }

    /// A sequence leaves all of its blocks.
    pub(super) fn give_back(&mut self, from: &mut Vec<u32>) {
        for number in from.drain(..).rev() {
            let block = &mut self.blocks[number as usize];
            block.holders -= 1;
            if block.holders > 0 {
                continue;
            }
            if block.content.is_none() {
                self.blank.push(number);
                continue;
            }
            block.left = self.next;
            self.kept.insert(block.left, number);
            self.next += 1;
        }
    }

    /// `block` holds these tokens from now on, unless another one does already; says what comes after them.
    pub(super) fn keep(&mut self, block: u32, before: Before, tokens: [u32; BLOCK]) -> Before {
        let content = (before, tokens);
        let known = self.by_content.get(&content).and_then(|&other| self.blocks[other as usize].content);
        if let Some((_, number)) = known {
            return Before::Content(number);
        }
        let number = self.next;
        self.next += 1;
        self.by_content.insert(content, block);
        self.blocks[block as usize].content = Some((content, number));
        Before::Content(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Before = Before::Start(None);

    fn tokens(blocks: &[u32]) -> Vec<u32> {
        blocks.iter().flat_map(|&token| [token; BLOCK]).collect()
    }

    /// A sequence of full blocks that was computed.
    fn computed(blocks: &mut Blocks, start: Before, tokens: &[u32]) -> Vec<u32> {
        let (mut held, mut before) = blocks.find(start, tokens);
        blocks.hold(&held);
        let all = tokens.as_chunks::<BLOCK>().0;
        let found = held.len();
        blocks.take(all.len() - found, &mut held);
        for (&block, tokens) in held.iter().zip(all).skip(found) {
            before = blocks.keep(block, before, *tokens);
        }
        held
    }

    #[test]
    fn sequences_that_begin_alike_hold_the_same_blocks() {
        let mut blocks = Blocks::new(8);
        let mut first = computed(&mut blocks, START, &tokens(&[1, 2, 3]));
        let mut second = computed(&mut blocks, START, &tokens(&[1, 2, 4]));
        assert_eq!((&first[..2], blocks.free()), (&second[..2], 4));
        assert_ne!(first[2], second[2]);
        blocks.give_back(&mut first);
        assert_eq!(blocks.free(), 5);
        blocks.give_back(&mut second);
        assert_eq!((blocks.free(), blocks.find(START, &tokens(&[1, 2, 3])).0.len()), (8, 3));
    }

    #[test]
    fn equal_tokens_behind_other_ones_or_of_another_adapter_are_something_else() {
        let mut blocks = Blocks::new(8);
        computed(&mut blocks, START, &tokens(&[1, 2]));
        for (start, other) in [
            (START, tokens(&[2])),
            (START, tokens(&[3, 2])),
            (Before::Start(Some(AdapterId(1))), tokens(&[1, 2])),
        ] {
            assert_eq!(blocks.find(start, &other), (vec![], start));
        }
        // What is not a whole block is not found.
        assert_eq!(blocks.find(START, &tokens(&[1, 2])[..31]).0.len(), 1);
    }

    #[test]
    fn room_is_made_of_what_was_left_first_and_of_ends_before_beginnings() {
        let mut blocks = Blocks::new(4);
        let mut older = computed(&mut blocks, START, &tokens(&[1, 2]));
        let mut newer = computed(&mut blocks, START, &tokens(&[3, 4]));
        blocks.give_back(&mut older);
        blocks.give_back(&mut newer);
        let mut other = Vec::new();
        blocks.take(1, &mut other);
        assert_eq!(blocks.find(START, &tokens(&[1, 2])).0.len(), 1);
        blocks.take(2, &mut other);
        assert_eq!(blocks.find(START, &tokens(&[1, 2])).0.len(), 0);
        assert_eq!((blocks.find(START, &tokens(&[3, 4])).0.len(), blocks.free()), (1, 1));
    }

    #[test]
    fn what_two_computed_at_the_same_time_is_kept_once_and_continued_by_both() {
        let mut blocks = Blocks::new(8);
        let (mut a, mut b) = (Vec::new(), Vec::new());
        blocks.take(2, &mut a);
        blocks.take(2, &mut b);
        let (after_a, after_b) = (blocks.keep(a[0], START, [1; BLOCK]), blocks.keep(b[0], START, [1; BLOCK]));
        assert_eq!(after_a, after_b);
        blocks.keep(b[1], after_b, [2; BLOCK]);
        assert_eq!(blocks.find(START, &tokens(&[1, 2])).0, [a[0], b[1]]);
        blocks.give_back(&mut a);
        blocks.give_back(&mut b);
        assert_eq!((blocks.free(), blocks.blank.len()), (8, 6));
    }
}
