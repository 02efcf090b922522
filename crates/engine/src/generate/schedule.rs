//! What the next step computes: a pure decision.
//!
//! Every running sequence that only awaits its next token gets one row; what is left of the step's rows goes to
//! prompts, the oldest first, in chunks. When the cache is full the youngest sequences give their blocks back and
//! are computed again later (on the CPU to the same bits). The oldest can always go on, since the plan gives the
//! cache at least one full context.

use lathe_plan::BLOCK;

/// A sequence as the scheduler sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SequenceState {
    /// Its id.
    pub id: u64,
    /// Tokens known: prompt and answer so far.
    pub total: usize,
    /// Whether more follow.
    pub answers: bool,
    /// Tokens in the cache; of one that waits, those of its beginning that are kept there.
    pub computed: usize,
    /// Blocks that hold them.
    pub blocks: usize,
    /// Of those, the ones that nobody else holds: of one that waits they are free, of one that runs they become free without it.
    pub alone: usize,
}

/// All that the decision depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// Sequences with blocks, the oldest first.
    pub running: Vec<SequenceState>,
    /// Sequences that hold none, the oldest first.
    pub waiting: Vec<SequenceState>,
    /// Blocks that nobody holds.
    pub free_blocks: usize,
    /// Sequences that may run.
    pub max_sequences: usize,
    /// Rows of a step; at least `max_sequences`.
    pub max_batch_tokens: usize,
}

/// A part of a sequence that a step computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// The sequence.
    pub id: u64,
    /// Tokens from `computed` on.
    pub rows: usize,
    /// Blocks to be added to those it holds.
    pub new_blocks: usize,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StepPlan {
    /// Sequences that give their blocks back first.
    pub preempt: Vec<u64>,
    /// What is computed, with waiting sequences that begin.
    pub run: Vec<Chunk>,
}

/// Decides the next step.
pub fn schedule(state: &State) -> StepPlan {
    let mut plan = StepPlan::default();
    let mut free = state.free_blocks;
    let mut rows_left = state.max_batch_tokens;
    let mut chosen: Vec<Option<Chunk>> = vec![None; state.running.len()];
    let mut alive = vec![true; state.running.len()];

    let decodes = |s: &SequenceState| s.total - s.computed == 1;
    let (first, second): (Vec<usize>, Vec<usize>) =
        (0..state.running.len()).partition(|&i| decodes(&state.running[i]));
    for i in first.into_iter().chain(second) {
        let sequence = &state.running[i];
        let wanted = (sequence.total - sequence.computed).min(rows_left);
        if !alive[i] || wanted == 0 {
            continue;
        }
        let new_blocks = more_blocks(sequence, wanted);
        while new_blocks > free {
            let Some(victim) = (i + 1..alive.len()).rev().find(|&j| alive[j]) else { break };
            alive[victim] = false;
            free += state.running[victim].alone;
            if let Some(chunk) = chosen[victim].take() {
                (free, rows_left) = (free + chunk.new_blocks, rows_left + chunk.rows);
            }
            plan.preempt.push(state.running[victim].id);
        }
        // With nobody left to ask, as much as there is room for; older sequences will end and make more.
        let room = (sequence.blocks + free) * BLOCK - sequence.computed;
        let rows = wanted.min(room);
        if rows > 0 {
            let new_blocks = more_blocks(sequence, rows);
            chosen[i] = Some(Chunk { id: sequence.id, rows, new_blocks });
            (free, rows_left) = (free - new_blocks, rows_left - rows);
        }
    }
    let mut running = alive.iter().filter(|&&a| a).count();
    plan.run.extend(chosen.into_iter().flatten());

    // New sequences begin only where the whole prompt and one more token (where one follows) have room, and never in
    // place of one that was just sent away.
    for sequence in &state.waiting {
        let most = sequence.total + usize::from(sequence.answers);
        let needed = sequence.alone + more_blocks(sequence, most - sequence.computed);
        if running == state.max_sequences || rows_left == 0 || needed > free || !plan.preempt.is_empty() {
            break;
        }
        let rows = (sequence.total - sequence.computed).min(rows_left);
        plan.run.push(Chunk { id: sequence.id, rows, new_blocks: more_blocks(sequence, rows) });
        // The rest of the prompt is set aside, so that two newcomers do not count on the same blocks.
        (free, rows_left, running) = (free - needed, rows_left - rows, running + 1);
    }
    plan
}

fn more_blocks(sequence: &SequenceState, rows: usize) -> usize {
    (sequence.computed + rows).div_ceil(BLOCK).saturating_sub(sequence.blocks)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(id: u64, total: usize, computed: usize) -> SequenceState {
        let blocks = computed.div_ceil(BLOCK);
        SequenceState { id, total, answers: true, computed, blocks, alone: blocks }
    }

    fn state(running: &[SequenceState], waiting: &[SequenceState], free_blocks: usize) -> State {
        let (running, waiting) = (running.to_vec(), waiting.to_vec());
        State { running, waiting, free_blocks, max_sequences: 4, max_batch_tokens: 32 }
    }

    fn run(plan: &StepPlan) -> Vec<(u64, usize, usize)> {
        plan.run.iter().map(|c| (c.id, c.rows, c.new_blocks)).collect()
    }

    #[test]
    fn next_tokens_come_first_and_prompts_share_the_rest_in_chunks() {
        let plan = schedule(&state(&[sequence(1, 100, 16), sequence(2, 17, 16)], &[sequence(3, 9, 0)], 100));
        assert_eq!(run(&plan), [(1, 31, 2), (2, 1, 1)]);
        let plan = schedule(&state(&[sequence(2, 17, 16)], &[sequence(3, 9, 0), sequence(4, 90, 0)], 100));
        assert_eq!(run(&plan), [(2, 1, 1), (3, 9, 1), (4, 22, 2)]);
    }

    #[test]
    fn a_full_cache_sends_the_youngest_away_and_admits_nobody() {
        let running = [sequence(1, 17, 16), sequence(2, 33, 32), sequence(3, 20, 0)];
        let plan = schedule(&state(&running, &[sequence(4, 2, 0)], 0));
        assert_eq!((plan.preempt.clone(), run(&plan)), (vec![3, 2], vec![(1, 1, 1)]));
    }

    #[test]
    fn who_was_chosen_already_can_still_be_sent_away() {
        // The younger one decodes first, but the older prompt needs its block.
        let running = [sequence(1, 40, 16), sequence(2, 17, 16)];
        let plan = schedule(&state(&running, &[], 1));
        assert_eq!((plan.preempt.clone(), run(&plan)), (vec![2], vec![(1, 24, 2)]));
    }

    #[test]
    fn a_prompt_waits_until_it_has_room_in_full() {
        let plan = schedule(&state(&[], &[sequence(1, 48, 0), sequence(2, 3, 0)], 3));
        assert_eq!(run(&plan), []);
        let plan = schedule(&state(&[], &[sequence(1, 47, 0), sequence(2, 3, 0)], 3));
        assert_eq!(run(&plan), [(1, 32, 2)]);
    }

    #[test]
    fn a_prompt_that_nothing_follows_needs_no_room_for_more() {
        let prompt = SequenceState { answers: false, ..sequence(1, 48, 0) };
        assert_eq!(run(&schedule(&state(&[], &[prompt], 2))), []);
        assert_eq!(run(&schedule(&state(&[], &[prompt], 3))), [(1, 32, 2)]);
    }

    #[test]
    fn a_beginning_that_is_kept_is_not_read_and_needs_room_only_where_nobody_holds_it() {
        let unheld = sequence(1, 47, 32);
        let held = SequenceState { alone: 0, ..unheld };
        assert_eq!(run(&schedule(&state(&[], &[held], 1))), [(1, 15, 1)]);
        assert_eq!(run(&schedule(&state(&[], &[unheld], 2))), []);
        assert_eq!(run(&schedule(&state(&[], &[unheld], 3))), [(1, 15, 1)]);
    }

    #[test]
    fn who_is_sent_away_frees_only_what_nobody_else_holds() {
        // Four that began alike, each at the end of its blocks: eight are everybody's, two its own.
        let shared = |id| SequenceState { alone: 2, ..sequence(id, 161, 160) };
        let plan = schedule(&state(&[shared(1), shared(2), shared(3), shared(4)], &[], 0));
        assert_eq!(plan.preempt, [4]);
        assert_eq!(run(&plan), [(1, 1, 1), (2, 1, 1)], "two blocks have room for two");
    }
}
