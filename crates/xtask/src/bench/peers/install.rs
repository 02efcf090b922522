//! The peers' packages, from PyPI, in the environment of the tests against Python.

use std::process::Command;

use anyhow::{Result, anyhow};

use super::contestant::Contestant;
use crate::{command, paths, test, toolchain, ui};

/// What a peer needs beside torch and transformers: its packages, their modules, programs (and Debian's packages
/// of them) to build with, how long it takes.
struct Needs {
    contestant: Contestant,
    packages: &'static [&'static str],
    modules: &'static str,
    programs: &'static [(&'static str, &'static str)],
    takes: &'static str,
}

const NEEDS: [Needs; 2] = [
    Needs {
        contestant: Contestant::LlamaCpp,
        packages: &["llama-cpp-python==0.3.36", "gguf==0.19.0"],
        modules: "llama_cpp, gguf",
        programs: &[("c++", "g++")],
        takes: "built from source by a C++ compiler: about 6 minutes on 2 cores, once",
    },
    Needs {
        contestant: Contestant::OpenVino,
        packages: &["openvino-genai==2026.4.1.0", "gguf==0.19.0"],
        modules: "openvino_genai, gguf",
        programs: &[],
        takes: "about 100 MB, once",
    },
];

/// An interpreter, and which peers it lacks.
pub struct Python {
    interpreter: String,
    lacks: Vec<(Contestant, String)>,
}

impl Python {
    /// Installs what is not there yet.
    ///
    /// # Errors
    /// torch and transformers cannot be had. What else fails is kept to be told.
    pub fn prepare() -> Result<Self> {
        let interpreter = test::python()?;
        let mut lacks = Vec::new();
        for needs in &NEEDS {
            let step = ui::step(needs.packages.join(" "));
            step.expect(needs.takes);
            match install(&interpreter, needs) {
                Ok(()) => step.done(""),
                Err(error) => lacks.push((needs.contestant, format!("{error:#}"))),
            }
        }
        Ok(Self { interpreter, lacks })
    }

    /// Its path.
    pub fn interpreter(&self) -> &str {
        &self.interpreter
    }

    /// Whether the peer is there.
    ///
    /// # Errors
    /// It could not be installed.
    pub fn has(&self, contestant: Contestant) -> Result<()> {
        match self.lacks.iter().find(|(of, _)| *of == contestant) {
            Some(_) => Err(anyhow!("it could not be installed")),
            None => Ok(()),
        }
    }

    /// What could not be installed, and the last words about that.
    pub fn notes(&self) -> Vec<String> {
        let note = |(contestant, error): &(Contestant, String)| {
            format!("{} could not be installed: {}.", contestant.name(), command::last_lines(error, 1))
        };
        self.lacks.iter().map(note).collect()
    }
}

fn install(python: &str, needs: &Needs) -> Result<()> {
    let there = || command::run(Command::new(python).args(["-c", &format!("import {}", needs.modules)]));
    if there().is_ok() {
        return Ok(());
    }
    toolchain::packages(needs.programs)?;
    let mut pip = Command::new(python);
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint"]);
    pip.arg(paths::repository().join("tests/python/requirements.txt")).args(needs.packages);
    // All instructions of this machine, and nothing but the library.
    pip.env("CMAKE_ARGS", "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF");
    command::run(&mut pip)?;
    there().map(drop)
}
