//! Results in a bucket: an S3 server that checks signatures, with the key in a mounted Secret.
use std::fs;

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use lathe_contract::{EvaluateTask, InspectTask, Metric, Outcome, SourceRef, Task};
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

use crate::world::{World, input};

struct Bucket {
    root: TempDir,
    address: std::net::SocketAddr,
    _server: Runtime,
}

impl Bucket {
    fn start() -> Bucket {
        let root = tempfile::tempdir().expect("folder");
        fs::create_dir(root.path().join("models")).expect("bucket");
        let server = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let server = server.expect("threads");
        let listener = server.block_on(TcpListener::bind("127.0.0.1:0")).expect("a port");
        let address = listener.local_addr().expect("address");
        let mut service = S3ServiceBuilder::new(s3s_fs::FileSystem::new(root.path()).expect("files"));
        service.set_auth(SimpleAuth::from_single("key", "hunter2"));
        let service = service.build();
        server.spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let service = service.clone();
                tokio::spawn(async move {
                    Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(socket), service).await
                });
            }
        });
        Bucket { root, address, _server: server }
    }

    fn source(&self, world: &World, path: &str, secret: &str) -> SourceRef {
        let dir = world.path("secret");
        fs::create_dir_all(&dir).expect("folder");
        for (key, value) in [
            ("AWS_ACCESS_KEY_ID", "key"),
            ("AWS_SECRET_ACCESS_KEY", secret),
            ("AWS_REGION", "us-east-1"),
            ("AWS_ENDPOINT_URL", &format!("http://{}", self.address)),
        ] {
            fs::write(dir.join(key), value).expect("a key");
        }
        SourceRef {
            uri: format!("s3://models/{path}"),
            revision: None,
            digest: None,
            secret_dir: Some(dir.display().to_string()),
        }
    }
}

#[test]
fn an_adapter_goes_to_a_bucket_and_is_found_there_again() {
    let (world, bucket) = (World::new(), Bucket::start());
    let mut task = world.train_task();
    task.output.destination = bucket.source(&world, "team", "hunter2");
    let trained = world.trained(task.clone());
    let hex = trained.digest.strip_prefix("sha256:").expect("a digest");
    assert_eq!(trained.uri, format!("s3://models/team/tuned/{hex}"));
    assert!(
        bucket.root.path().join("models/team/tuned").join(hex).join("adapter_model.safetensors").exists()
    );

    assert_eq!(world.trained(task).digest, trained.digest);
    let source = bucket.source(&world, "team/tuned", "hunter2");
    let uid = "11111111-2222-3333-4444-555555555555";
    let again = world.run(Task::Inspect(InspectTask { source, summary_of: Some(uid.into()) }));
    assert_eq!(again.trained().digest, trained.digest);

    let mut adapter = input("adapter");
    adapter.source = bucket.source(&world, &format!("team/tuned/{hex}"), "hunter2");
    adapter.source.digest = Some(trained.digest.clone());
    let evaluated = world.run(Task::Evaluate(EvaluateTask {
        base: input("base"),
        adapter: Some(adapter),
        dataset: world.train_task().dataset,
        metrics: vec![Metric::Perplexity],
        sequence_length: 64,
    }));
    assert!(matches!(evaluated.outcome, Some(Outcome::Evaluated(_))), "{}", evaluated.log);
}

#[test]
fn a_wrong_key_is_told_before_anything_is_trained() {
    let (world, bucket) = (World::new(), Bucket::start());
    let mut task = world.train_task();
    task.output.destination = bucket.source(&world, "team", "wrong");
    let ended = world.train(task);
    assert!(!ended.log.contains("phase=Training"), "{}", ended.log);
    ended.refused("Unauthorized");
}
