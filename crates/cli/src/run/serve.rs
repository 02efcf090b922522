//! InferenceServices on localhost, until the user has had enough.
use futures::future::select_all;
use lathe_api::{Access, InferenceService, InferenceServiceSpec, Model};
use lathe_resolve::inference::{ServeFacts, model_ids, serving};

use super::show::Event;
use super::worker::Running;
use super::{Run, name, reference, worker};
use crate::failure::{Done, Problem};
use crate::output::{Output, say};

impl Run {
    /// Serves all of them, each on its port.
    pub(super) async fn serve(&mut self, services: &[InferenceService]) -> Done<()> {
        let mut running = Vec::new();
        for service in services {
            if service.spec.replicas == 0 && service.spec.autoscaling.is_none() {
                self.skip(&format!("InferenceService {}", name(&service.metadata)), "`spec.replicas` is 0");
                continue;
            }
            let port = match self.args.port {
                0 => 0,
                first => port(first, running.len())?,
            };
            running.push(self.serve_one(service, port).await?);
        }
        if running.is_empty() {
            return Ok(());
        }
        self.show.note("Ctrl-C ends it, after the answers in flight.");
        let ended = tokio::select! {
            _ = self.stop.next() => None,
            (problem, _, _) = select_all(running.iter_mut().map(|worker| Box::pin(worker.ended()))) => Some(problem),
        };
        if let Some(problem) = ended {
            return Err(problem);
        }
        for worker in &mut running {
            worker.end(&self.show, &mut self.stop).await?;
        }
        Ok(())
    }

    async fn serve_one(&mut self, service: &InferenceService, port: u16) -> Done<Running> {
        let object = reference("InferenceService", &service.metadata, &service.spec);
        let what = worker::object_name(&object);
        let of = |problem: Problem| problem.of(&what);
        let base = self.model(&service.spec.model_ref.name).map_err(of)?;
        let adapters = service.spec.adapter_refs.iter().map(|adapter| self.model(&adapter.name));
        let adapters = adapters.collect::<Done<Vec<&Model>>>().map_err(of)?;
        let facts = ServeFacts {
            object,
            trust: self.workers.trust().clone(),
            base,
            adapters: &adapters,
            profiles: &self.profiles,
            images: &self.images,
            room: None,
            profile: None,
        };
        // On localhost, for one user: no gateway is there to sign requests, whatever the manifest says.
        let spec = InferenceServiceSpec { access: Access::Direct, ..service.spec.clone() };
        let serving = serving(&spec, &facts).map_err(|rejection| of(rejection.into()))?;
        let mut running = self.workers.start(
            &self.place,
            &mut self.show,
            serving.contract,
            service.spec.pod.as_ref(),
            Some(port),
        )?;
        self.workers.until_ready(&mut running, &mut self.show, &mut self.stop).await.map_err(|problem| {
            match problem.reason.as_str() {
                "Stopped" => problem,
                "PortTaken" => Problem {
                    message: format!("{} Or choose another one by --port.", problem.message),
                    ..problem
                },
                _ => of(problem),
            }
        })?;
        let port = running.serve.map_or(port, |address| address.port());
        let url = format!("http://localhost:{port}");
        let models = model_ids(&name(&service.metadata), &service.spec);
        self.show.done(&format!("{url} answers to {}", models.join(", ")));
        if self.args.output == Output::Text {
            // The last one is what was tuned, where something was.
            let asked = models.last().map(String::as_str).unwrap_or_default();
            say(&format!(
                "\n  lathe chat --url {url} --model {asked}\n  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n    -d '{{\"model\": \"{asked}\", \"messages\": [{{\"role\": \"user\", \"content\": \"Hello\"}}]}}'\n"
            ));
        }
        self.show.event(&Event::Serving { object: &what, url: &url, models: &models });
        Ok(running)
    }
}

fn port(first: u16, index: usize) -> Done<u16> {
    let port = u16::try_from(index).ok().and_then(|index| first.checked_add(index));
    port.ok_or_else(|| {
        Problem::user(
            "InvalidSettings",
            format!("there is no port {first} + {index}. Next: --port with a lower one."),
        )
    })
}
