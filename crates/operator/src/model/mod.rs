//! `Model`: a pod reads the headers of its source; what it found becomes the status.
//!
//! observe (what is there) -> plan (what is missing) -> build (the objects for it) -> apply -> status.
mod build;
mod observe;
mod plan;
mod status;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use futures::{FutureExt as _, future::BoxFuture};
use jiff::Timestamp;
use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{ConfigMap, PersistentVolumeClaim, Pod},
    networking::v1::NetworkPolicy,
};
use kube::{
    ResourceExt as _,
    runtime::{controller::Action, reflector::Store, watcher},
};
use lathe_api::{Model, ModelStatus, conditions, names};

use crate::{
    apply::Happened,
    claims,
    context::{Context, Scope},
    error::{Error, told},
    job::Owner,
    runtime::{Guard, Reconcile, Stop, Watches, labelled_owner},
};
use observe::Observed;
use plan::{Plan, Write};

/// Value of the label `lathe.dev/kind`.
const KIND: &str = "model";

/// The controller of Models.
struct Models {
    context: Arc<Context>,
    models: Store<Guard<Model>>,
    jobs: Store<Job>,
    pods: Store<Pod>,
    claims: Store<PersistentVolumeClaim>,
    contracts: Store<ConfigMap>,
    policies: Store<NetworkPolicy>,
}

/// Looks after the Models of `scope` until `stop`.
pub fn controller(context: &Arc<Context>, scope: &Scope, stop: &Stop) -> BoxFuture<'static, ()> {
    let client = &context.client;
    let mut watches = Watches::<Model>::new(scope, client);
    let ours = watcher::Config::default().labels(&format!("{}={KIND}", names::LABEL_KIND));
    let models = Models {
        context: context.clone(),
        models: watches.objects(),
        jobs: watches.also(scope.api(client), ours.clone(), |job: &Job, _| labelled_owner(job)),
        contracts: watches.also(scope.api(client), ours.clone(), |map: &ConfigMap, _| labelled_owner(map)),
        policies: watches
            .also(scope.api(client), ours.clone(), |policy: &NetworkPolicy, _| labelled_owner(policy)),
        pods: watches.also(scope.api(client), ours, |pod: &Pod, _| labelled_owner(pod)),
        claims: watches.also(
            scope.api(client),
            watcher::Config::default(),
            |_: &PersistentVolumeClaim, _| Vec::new(),
        ),
    };
    watches.run(models, stop.clone()).boxed()
}

impl Reconcile for Models {
    type Object = Model;
    const NAME: &'static str = "Model";
    const SUMMARY: &'static str = conditions::READY;

    fn context(&self) -> &Context {
        &self.context
    }

    async fn reconcile(&self, model: &Model) -> Result<Action, Error> {
        let observed = observe::observe(self, model, Timestamp::now()).await;
        let plan = plan::plan(model, &observed);
        let (refusal, done) = told(self.apply(model, &observed, &plan).await)?;
        let fresh = status::status(model, &observed, &plan, refusal.as_ref());
        if self.context.writer.status(model, model.status.as_ref(), &fresh).await? {
            tracing::info!(model = model.name_any(), namespace = ?model.namespace(), reason = plan.view.reason(), "status");
            self.tell(model, &fresh).await;
        }
        done?;
        Ok(plan.next.map_or_else(Action::await_change, Action::requeue))
    }
}

impl Models {
    /// Becoming ready, and what only a person can mend, is told as an event too.
    async fn tell(&self, model: &Model, fresh: &ModelStatus) {
        let became = |type_: &str| {
            let is_true = |status: &ModelStatus| conditions::is_true(&status.conditions, type_);
            is_true(fresh) && !model.status.as_ref().is_some_and(is_true)
        };
        let good = became(conditions::READY);
        let ready = conditions::find(&fresh.conditions, conditions::READY);
        if let Some(is) = ready.filter(|_| good || became(conditions::STALLED)) {
            let happened = Happened { good, reason: &is.reason, action: "Reconcile", message: &is.message };
            self.context.writer.event(model, &happened).await;
        }
    }

    async fn apply(&self, model: &Model, observed: &Observed, plan: &Plan) -> Result<(), Error> {
        let writer = &self.context.writer;
        match &plan.write {
            Write::Nothing => {
                let policy = build::policy(model, &self.context)?;
                let runs = [&observed.inspection];
                observed.beside.lacks(&Owner::of(model), KIND, policy, &runs)?.apply(writer).await?;
            }
            Write::Inspect(seen) => {
                let namespace = model.namespace().unwrap_or_default();
                let one_node = claims::one_node(&self.claims, &namespace, &self.context.config.artifacts);
                writer.start(&build::inspection(model, &self.context, &one_node, seen)?).await?;
            }
            Write::DeleteJob => {
                if let Some(job) = &observed.inspection.job {
                    writer.clean_up(&**job).await?;
                }
            }
        }
        Ok(())
    }
}
