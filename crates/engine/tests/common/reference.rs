//! The decoder in f64, one token at a time, as the papers write it.

use std::collections::HashMap;

use lathe_engine::plan::{ModelShape, RopeScaling, Target};
use lathe_engine::{Adapter, Row};

use super::{Noise, floats};

pub struct Reference {
    pub shape: ModelShape,
    pub tensors: HashMap<String, Vec<f64>>,
    /// The adapter's factor.
    pub scale: f64,
}

impl Reference {
    pub fn new(shape: &ModelShape) -> Reference {
        let noise = Noise(shape.clone());
        let tensors = shape.tensors().into_iter().map(|t| {
            let values = noise.values(&t.name).unwrap().1;
            (t.name, values.into_iter().map(f64::from).collect())
        });
        Reference { shape: shape.clone(), tensors: tensors.collect(), scale: 0.0 }
    }

    /// Adds an adapter under PEFT's names.
    pub fn with_adapter(mut self, adapter: &Adapter) -> Reference {
        self.scale = f64::from(adapter.spec().alpha) / adapter.spec().rank as f64;
        for tensor in adapter.tensors() {
            self.tensors.insert(tensor.name, floats(&tensor.data).into_iter().map(f64::from).collect());
        }
        self
    }

    fn get(&self, name: &str) -> &[f64] {
        &self.tensors[name]
    }

    fn linear(&self, layer: usize, target: Target, x: &[f64]) -> Vec<f64> {
        let module = target.module(layer);
        let mut y = product(self.get(&format!("{module}.weight")), x);
        if let Some(bias) = self.tensors.get(&format!("{module}.bias")) {
            y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
        }
        let part = |p| self.tensors.get(&format!("base_model.model.{module}.lora_{p}.weight"));
        if let (Some(a), Some(b)) = (part("A"), part("B")) {
            let delta = product(b, &product(a, x));
            y.iter_mut().zip(delta).for_each(|(y, d)| *y += self.scale * d);
        }
        y
    }

    fn norm(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let inv = 1.0 / (mean + self.shape.rms_eps).sqrt();
        x.iter().zip(self.get(name)).map(|(x, w)| x * inv * w).collect()
    }

    fn rope(&self, x: &mut [f64], position: usize) {
        let (width, half) = (self.shape.head_dim, self.shape.head_dim / 2);
        for head in x.chunks_mut(width) {
            for j in 0..half {
                let plain = self.shape.rope_theta.powf(-2.0 * j as f64 / width as f64);
                let angle = position as f64 * stretched(self.shape.rope_scaling, plain);
                let (a, b) = (head[j], head[j + half]);
                head[j] = a * angle.cos() - b * angle.sin();
                head[j + half] = b * angle.cos() + a * angle.sin();
            }
        }
    }

    /// Logits after every token.
    pub fn logits(&self, tokens: &[u32]) -> Vec<Vec<f64>> {
        let s = &self.shape;
        let embedding = self.get("model.embed_tokens.weight");
        let mut stream: Vec<Vec<f64>> =
            tokens.iter().map(|&t| embedding[t as usize * s.hidden..][..s.hidden].to_vec()).collect();
        for layer in 0..s.layers {
            let (mut keys, mut values) = (Vec::new(), Vec::new());
            for (position, x) in stream.iter_mut().enumerate() {
                let n = self.norm(&format!("model.layers.{layer}.input_layernorm.weight"), x);
                let mut q = self.linear(layer, Target::Q, &n);
                let mut k = self.linear(layer, Target::K, &n);
                self.rope(&mut q, position);
                self.rope(&mut k, position);
                keys.push(k);
                values.push(self.linear(layer, Target::V, &n));
                let attention = self.attend(&q, &keys, &values);
                let out = self.linear(layer, Target::O, &attention);
                let h: Vec<f64> = x.iter().zip(out).map(|(x, o)| x + o).collect();
                let n = self.norm(&format!("model.layers.{layer}.post_attention_layernorm.weight"), &h);
                let (gate, up) = (self.linear(layer, Target::Gate, &n), self.linear(layer, Target::Up, &n));
                let act: Vec<f64> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
                let down = self.linear(layer, Target::Down, &act);
                *x = h.iter().zip(down).map(|(h, d)| h + d).collect();
            }
        }
        let head = if s.tie_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" };
        stream.iter().map(|x| product(self.get(head), &self.norm("model.norm.weight", x))).collect()
    }

    fn attend(&self, q: &[f64], keys: &[Vec<f64>], values: &[Vec<f64>]) -> Vec<f64> {
        let first = self.shape.sliding_window.map_or(0, |window| keys.len().saturating_sub(window));
        let (keys, values) = (&keys[first..], &values[first..]);
        let (width, group) = (self.shape.head_dim, self.shape.heads / self.shape.kv_heads);
        let mut out = Vec::new();
        for (head, q) in q.chunks(width).enumerate() {
            let at = head / group * width..(head / group + 1) * width;
            let score = |k: &Vec<f64>| dot(q, &k[at.clone()]) / (width as f64).sqrt();
            let weights: Vec<f64> = keys.iter().map(|k| score(k).exp()).collect();
            let sum: f64 = weights.iter().sum();
            out.extend(
                at.clone().map(|d| values.iter().zip(&weights).map(|(v, w)| v[d] * w / sum).sum::<f64>()),
            );
        }
        out
    }

    /// Per token after the first its log-probability.
    pub fn log_probs(&self, tokens: &[u32]) -> Vec<f64> {
        let logits = self.logits(&tokens[..tokens.len() - 1]);
        let log_prob = |(logits, &token): (&Vec<f64>, &u32)| {
            logits[token as usize] - logits.iter().map(|x| x.exp()).sum::<f64>().ln()
        };
        logits.iter().zip(&tokens[1..]).map(log_prob).collect()
    }

    /// The mean over weighted tokens.
    pub fn loss(&self, rows: &[Row]) -> f64 {
        let (mut sum, mut total) = (0.0, 0.0);
        for row in rows {
            for (p, &w) in self.log_probs(&row.tokens).iter().zip(&row.weights[1..]) {
                sum -= f64::from(w) * p;
                total += f64::from(w);
            }
        }
        sum / total
    }

    /// The derivative of the loss by one element of one tensor, by central differences.
    pub fn derivative(&mut self, name: &str, i: usize, rows: &[Row]) -> f64 {
        let step = 1e-5;
        let mut at = |x: f64| {
            self.tensors.get_mut(name).unwrap()[i] += x;
            let loss = self.loss(rows);
            self.tensors.get_mut(name).unwrap()[i] -= x;
            loss
        };
        (at(step) - at(-step)) / (2.0 * step)
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn product(w: &[f64], x: &[f64]) -> Vec<f64> {
    w.chunks(x.len()).map(|row| dot(row, x)).collect()
}

fn stretched(scaling: RopeScaling, frequency: f64) -> f64 {
    match scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
            let turns = original_max_position as f64 * frequency / std::f64::consts::TAU;
            let smooth = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
            frequency * (smooth + (1.0 - smooth) / factor)
        }
    }
}
