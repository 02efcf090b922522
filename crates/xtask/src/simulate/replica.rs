//! A replica as a token server: prompts are read one after another, sequences are decoded together.
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use lathe_scaling::Capacity;

use super::trace::Request;

/// What a replica can do.
#[derive(Clone, Copy, Debug)]
pub struct Server {
    /// Prompt tokens a second.
    pub prefill: f64,
    /// Seconds of a decoding step, whatever is in it: the weights are read once.
    pub step: f64,
    /// Seconds that each sequence adds to it.
    pub step_each: f64,
    /// Sequences that are decoded together.
    pub sequences: usize,
    /// Requests that may wait; more are refused.
    pub waiting: usize,
}

/// One device with a model of some billion parameters; requests wait as in Lathe's worker: four batches of them.
pub const SERVER: Server =
    Server { prefill: 8000.0, step: 0.020, step_each: 0.0003, sequences: 32, waiting: 128 };

impl Server {
    /// What it would measure at saturation.
    pub fn capacity(&self) -> Capacity {
        let batch = self.sequences as f64;
        Capacity {
            prompt: self.prefill,
            generation: batch / self.step_of(self.sequences),
            sequences: self.sequences as u32,
        }
    }

    /// Seconds of a saturated replica that a request takes.
    pub fn work(&self, request: &Request) -> f64 {
        let Capacity { prompt, generation, .. } = self.capacity();
        f64::from(request.prompt) / prompt + f64::from(request.output) / generation
    }

    fn step_of(&self, running: usize) -> f64 {
        self.step + self.step_each * running as f64
    }
}

/// A replica's queue, its batch, and what it did since it was last asked.
#[derive(Debug, Default)]
pub struct Replica {
    clock: f64,
    queue: VecDeque<Request>,
    /// The prompt that is being read, and until when.
    reading: Option<(f64, Request)>,
    /// Tokens that each sequence of the batch has generated since the replica began: all go at one pace.
    pace: f64,
    /// Where on that pace each running sequence ends, with its tokens; in millionths, so that they have an order.
    running: BinaryHeap<Reverse<(u64, u32)>>,
    /// Tokens of all requests that it has.
    outstanding: u64,
    /// Since [`Replica::take`].
    done: Done,
}

/// What a replica did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Done {
    /// Prompt tokens read.
    pub prompt: f64,
    /// Tokens generated.
    pub generation: f64,
    /// Requests that ended.
    pub finished: f64,
}

impl Replica {
    /// One that is there from `now` on.
    pub fn new(now: f64) -> Self {
        Self { clock: now, ..Self::default() }
    }

    /// Takes a request into its queue; the replica must have been brought to the present.
    pub fn push(&mut self, request: Request) {
        self.outstanding += tokens(&request);
        self.queue.push_back(request);
    }

    /// Tokens of all requests that it has.
    pub fn outstanding(&self) -> u64 {
        self.outstanding
    }

    /// Requests in its queue.
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// Requests that it works on.
    pub fn running(&self) -> usize {
        self.running.len() + usize::from(self.reading.is_some())
    }

    /// What it did since this was last asked.
    pub fn take(&mut self) -> Done {
        std::mem::take(&mut self.done)
    }

    /// Works until `now`; `first_token` is told of each request whose first token comes, and when.
    ///
    /// As engines with continuous batching do: a prompt is read as soon as there is a place in the batch, and decoding waits for it.
    pub fn advance(&mut self, server: &Server, now: f64, mut first_token: impl FnMut(&Request, f64)) {
        while self.clock < now {
            if self.reading.is_none() && self.running.len() < server.sequences {
                let next = self.queue.pop_front();
                self.reading =
                    next.map(|request| (self.clock + f64::from(request.prompt) / server.prefill, request));
            }
            if let Some((end, request)) = self.reading {
                if end > now {
                    self.clock = now;
                    return;
                }
                self.clock = end;
                self.reading = None;
                self.done.prompt += f64::from(request.prompt);
                first_token(&request, end);
                let ends = self.pace + f64::from(request.output);
                self.running.push(Reverse(((ends * 1e6) as u64, request.prompt + request.output)));
                continue;
            }
            let Some(&Reverse((ends, tokens))) = self.running.peek() else {
                self.clock = now;
                return;
            };
            let count = self.running.len();
            let step = server.step_of(count);
            let ends = (ends as f64 / 1e6).max(self.pace);
            let end = self.clock + (ends - self.pace) * step;
            let until = end.min(now);
            let pace = if end <= now { ends } else { self.pace + (now - self.clock) / step };
            self.done.generation += (pace - self.pace) * count as f64;
            (self.pace, self.clock) = (pace, until);
            if end <= now {
                self.running.pop();
                self.done.finished += 1.0;
                self.outstanding = self.outstanding.saturating_sub(u64::from(tokens));
            }
        }
    }
}

fn tokens(request: &Request) -> u64 {
    u64::from(request.prompt) + u64::from(request.output)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(requests: &[Request], seconds: u32) -> (Replica, Vec<(u32, f64)>) {
        let (mut replica, mut firsts) = (Replica::new(0.0), Vec::new());
        let mut next = requests.iter().peekable();
        for tenth in 1..=seconds * 10 {
            let now = f64::from(tenth) / 10.0;
            while let Some(request) = next.next_if(|request| request.at < now) {
                replica.push(*request);
            }
            replica.advance(&SERVER, now, |request, at| firsts.push((request.prompt, at)));
        }
        (replica, firsts)
    }

    #[test]
    fn one_request_takes_its_prompt_and_a_step_a_token() {
        let (mut replica, firsts) = run(&[Request { at: 0.0, prompt: 800, output: 100 }], 1);
        assert_eq!(firsts, [(800, 0.1)]);
        assert_eq!(replica.running(), 1);
        // 0.1 s of reading, then 20.3 ms a token.
        let generated = 0.9 / 0.0203;
        assert!((replica.take().generation - generated).abs() < 1e-6);
        replica.advance(&SERVER, 0.1 + 100.0 * 0.0203 + 0.001, |_, _| ());
        assert_eq!((replica.running(), replica.outstanding()), (0, 0));
        assert_eq!(replica.take().finished, 1.0);
    }

    #[test]
    fn a_full_batch_does_what_the_capacity_says_and_the_rest_waits() {
        let many = [Request { at: 0.0, prompt: 1, output: 10_000 }; 40];
        let (mut replica, firsts) = run(&many, 10);
        assert_eq!((firsts.len(), replica.running(), replica.waiting()), (32, 32, 8));
        replica.take();
        replica.advance(&SERVER, 20.0, |_, _| ());
        assert!((replica.take().generation - 10.0 * SERVER.capacity().generation).abs() < 1e-3);
    }
}
