//! What runs beside the requests for as long as the program does.
use tokio::task::JoinSet;

/// Tasks that end with the program alone; each gives its name, should it do so before.
pub type Tasks = JoinSet<&'static str>;

/// Waits until one of `tasks` ends, which is a bug: without it the program would live on and no longer do what it is for.
pub async fn lost(tasks: &mut Tasks) -> anyhow::Error {
    match tasks.join_next().await {
        Some(Ok(name)) => {
            anyhow::anyhow!("{name}: its task ended; report it to Lathe's maintainers with the log")
        }
        Some(Err(panic)) => {
            anyhow::anyhow!("a task ended: {panic}; report it to Lathe's maintainers with the log")
        }
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_ends_is_told_of() {
        let mut tasks = Tasks::new();
        tasks.spawn(std::future::pending());
        tasks.spawn(async { panic!("on purpose") });
        assert!(lost(&mut tasks).await.to_string().contains("on purpose"));
        tasks.spawn(async { "the keys" });
        assert!(lost(&mut tasks).await.to_string().starts_with("the keys: "));
    }
}
