use std::sync::Arc;

use rstest::rstest;
use serde_json::{Value, json};

use super::*;
use crate::testing::{object, service, slice};

fn at(last: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, last], 8080))
}

fn queue(ready: &[SocketAddr], slots: u32, waiting: u64) -> Queue {
    let mut queue = Queue::default();
    queue.sees(Some((ready.to_vec(), slots)));
    for number in 0..waiting {
        assert_eq!(queue.joins(number), number == 0);
    }
    queue
}

fn going(queue: &mut Queue, now: Instant) -> Vec<u64> {
    (0..10).filter(|number| matches!(queue.turn(*number, now), Turn::Go(_))).collect()
}

#[test]
fn first_come_first_served_and_no_more_at_a_time_than_are_decoded() {
    let (mut queue, now) = (queue(&[], 2, 5), Instant::now());
    assert_eq!(going(&mut queue, now), [0; 0]);
    assert!(queue.sees(Some((vec![at(1)], 2))));
    assert!(!queue.sees(Some((vec![at(1)], 2))), "that is no news");
    assert_eq!(queue.turn(4, now), Turn::Wait(None));
    assert_eq!(going(&mut queue, now), [0, 1]);
    assert_eq!(going(&mut queue, now), [0; 0]);
    queue.answered();
    assert_eq!(going(&mut queue, now), [2]);
    queue.leaves(3);
    queue.answered();
    queue.answered();
    assert_eq!(going(&mut queue, now), [4]);
    assert_eq!(queue.held(), 0);
}

#[test]
fn who_finds_no_room_keeps_its_place_and_nobody_goes_until_something_changes() {
    let (mut queue, now) = (queue(&[at(1)], 2, 4), Instant::now());
    let second = Duration::from_secs(1);
    assert_eq!(going(&mut queue, now), [0, 1]);
    queue.back(0, now + second);
    assert_eq!(queue.turn(0, now), Turn::Wait(Some(now + second)));
    assert_eq!(queue.turn(2, now), Turn::Wait(None), "it is behind");
    assert_eq!(going(&mut queue, now + second), [0]);
    // A shorter pause ends no longer one.
    queue.back(0, now + 2 * second);
    queue.back(1, now + second);
    assert_eq!(queue.turn(0, now + second), Turn::Wait(Some(now + 2 * second)));
    assert_eq!(going(&mut queue, now + 2 * second), [0, 1]);
    // One that was answered made room, and so does a replica more.
    queue.back(0, now + second);
    queue.answered();
    assert_eq!(going(&mut queue, now), [0, 2]);
    queue.back(2, now + second);
    queue.sees(Some((vec![at(1), at(2)], 2)));
    assert_eq!(going(&mut queue, now), [2, 3]);
    queue.sees(None);
    assert_eq!(queue.turn(3, now), Turn::Gone);
}

/// A table with the service `a/s` and its pods, beside `a/t` and `b/s` that have none.
fn table(spec: &Value, pods: &[&str]) -> Option<Arc<Table>> {
    let made = |namespace: &str, name: &str| {
        let mut made = serde_json::to_value(service(namespace, name, &[], &[])).unwrap();
        for (field, value) in spec.as_object().unwrap() {
            made["spec"][field] = value.clone();
        }
        object(made)
    };
    let services = [made("a", "s"), made("a", "t"), made("a", "u"), made("b", "s")];
    let pods: Vec<_> = pods.iter().map(|pod| (*pod, json!({"ready": true}))).collect();
    Some(Arc::new(Table::build(8080, &services, &[slice("a", "s", &pods)])))
}

fn automatic() -> Value {
    json!({"autoscaling": {"minReplicas": 0, "maxReplicas": 2}})
}

fn model(holds: &Holds, namespace: &str, name: &str) -> Arc<Model> {
    Arc::clone(holds.table.borrow().as_ref().unwrap().get(namespace, name).unwrap())
}

const BOUNDS: HoldBounds = HoldBounds { requests: 2, bytes: 100, time: Duration::from_secs(60) };

fn holds(first: Option<Arc<Table>>) -> (watch::Sender<Option<Arc<Table>>>, Arc<Holds>) {
    let sender = watch::Sender::new(first);
    let holds = Holds::new(BOUNDS, sender.subscribe(), Arc::default());
    (sender, holds)
}

#[rstest]
#[case::automatic(automatic(), true, true)]
#[case::automatic_whatever_replicas_says(json!({"autoscaling": {"maxReplicas": 2}, "replicas": 0}), true, true)]
#[case::fixed(json!({"replicas": 1}), false, true)]
#[case::stopped(json!({"replicas": 0}), false, false)]
#[tokio::test(start_paused = true)]
async fn who_may_wait(#[case] spec: Value, #[case] never_ready: bool, #[case] lost_lately: bool) {
    let (sender, holds) = holds(table(&spec, &[]));
    let may = || holds.may_wait(&model(&holds, "a", "s").service, Instant::now());
    assert_eq!(may(), never_ready);
    let sees = |pods: &[&str]| {
        sender.send_replace(table(&spec, pods));
        holds.see(Instant::now());
    };
    sees(&["10.0.0.1"]);
    tokio::time::advance(2 * BOUNDS.time).await;
    sees(&[]);
    assert_eq!(may(), lost_lately);
    // That the table changes otherwise makes nothing newer.
    tokio::time::advance(BOUNDS.time / 2).await;
    sees(&[]);
    assert_eq!(may(), lost_lately);
    tokio::time::advance(BOUNDS.time / 2).await;
    assert_eq!(may(), never_ready);
    sees(&[]);
    assert_eq!(may(), never_ready);
}

#[tokio::test(start_paused = true)]
async fn no_service_takes_its_namespaces_room_and_no_namespace_everybodys() {
    let (_sender, holds) = holds(table(&automatic(), &[]));
    let enter = |namespace: &str, name: &str, bytes| holds.enter(&model(&holds, namespace, name), bytes);
    let refused = |namespace: &str, name: &str, bytes| {
        let error = enter(namespace, name, bytes).unwrap_err();
        assert_eq!((error.status.as_u16(), error.code), (429, "hold_full"));
        error.message
    };
    let mut held = vec![enter("a", "s", 60).unwrap()];
    assert!(refused("a", "s", 41).contains("requests of 1 KiB wait"), "{}", refused("a", "s", 41));
    held.push(enter("a", "s", 40).unwrap());
    assert!(refused("a", "s", 0).contains("2 requests wait"));
    held.push(enter("a", "t", 0).unwrap());
    held.push(enter("a", "t", 0).unwrap());
    assert!(refused("a", "u", 0).contains("4 requests of its namespace wait"), "{}", refused("a", "u", 0));
    held.push(enter("b", "s", 0).unwrap());
    assert_eq!(
        holds.held(),
        [("uid-a-s", 2), ("uid-a-t", 2), ("uid-b-s", 1)].map(|(u, n)| (u.to_owned(), n)).into()
    );
    held.remove(0);
    held.push(enter("a", "s", 60).unwrap());
    drop(held);
    assert!(holds.are_empty());
    let text = holds.metrics.text().unwrap();
    for line in [
        "lathe_gateway_requests_held 0",
        "lathe_gateway_holds_total 6",
        "lathe_gateway_holds_refused_total 3",
        "lathe_gateway_hold_seconds_count 6",
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
    }
}

#[tokio::test(start_paused = true)]
async fn who_is_held_is_woken_by_a_replica_and_by_nothing_else() {
    let (sender, holds) = holds(table(&automatic(), &[]));
    let mut tasks = Tasks::new();
    follow(&mut tasks, Arc::clone(&holds));
    let mut begun = holds.begun();
    let mut held = holds.enter(&model(&holds, "a", "s"), 0).unwrap();
    let mut other = holds.enter(&model(&holds, "b", "s"), 0).unwrap();
    assert_eq!(*begun.borrow_and_update(), 2);
    let (turn, others) = (tokio::spawn(async move { (held.turn().await, held) }), other.turn());
    tokio::time::sleep(BOUNDS.time / 2).await;
    sender.send_replace(table(&automatic(), &["10.0.0.1"]));
    let (turn, mut held) = turn.await.unwrap();
    assert_eq!(turn.unwrap(), [at(1)]);
    assert_eq!(holds.held(), [("uid-b-s".to_owned(), 1)].into());
    // Back in its place, it is there again at once when the table changes, however long the pause.
    held.back(BOUNDS.time);
    sender.send_replace(table(&automatic(), &["10.0.0.2"]));
    assert_eq!(held.turn().await.unwrap(), [at(2)]);
    // It is the same hold: its time goes on.
    held.back(Duration::ZERO);
    sender.send_replace(table(&automatic(), &[]));
    holds.see(Instant::now());
    let error = held.turn().await.unwrap_err();
    assert_eq!((error.status.as_u16(), error.code), (503, "no_replica"));
    assert!(error.message.contains("within 60 s"), "{}", error.message);
    assert_eq!(others.await.unwrap_err().code, "no_replica");
    assert!(!begun.has_changed().unwrap(), "nobody new began to wait");

    drop((held, other));
    let mut gone = holds.enter(&model(&holds, "a", "s"), 0).unwrap();
    sender.send_replace(Some(Arc::default()));
    assert!(gone.turn().await.unwrap_err().message.contains("No replica"));
    drop(gone);
    assert!(holds.are_empty());
}

/// Whoever enters in the moment in which a replica becomes ready sees it, whether the table's change was followed yet or not.
#[tokio::test(start_paused = true)]
async fn who_enters_as_a_replica_becomes_ready_does_not_sleep() {
    let (sender, holds) = holds(table(&automatic(), &[]));
    let before = model(&holds, "a", "s");
    sender.send_replace(table(&automatic(), &["10.0.0.1"]));
    let mut held = holds.enter(&before, 0).unwrap();
    assert_eq!(held.turn().await.unwrap(), [at(1)]);
}

/// Whoever enters sees the change before the rest are told of it.
#[tokio::test(start_paused = true)]
async fn who_enters_as_a_replica_becomes_ready_wakes_those_before() {
    let (sender, holds) = holds(table(&automatic(), &[]));
    let before = model(&holds, "a", "s");
    let mut first = holds.enter(&before, 0).unwrap();
    let turn = tokio::spawn(async move { first.turn().await });
    tokio::task::yield_now().await;
    sender.send_replace(table(&automatic(), &["10.0.0.1"]));
    let _second = holds.enter(&before, 0).unwrap();
    holds.see(Instant::now());
    let turn = tokio::time::timeout(BOUNDS.time / 2, turn).await.expect("it is woken");
    assert_eq!(turn.unwrap().unwrap(), [at(1)]);
}

/// Two went, and there is one place for both of them as they come back.
#[tokio::test(start_paused = true)]
async fn who_came_back_while_there_was_no_place_goes_when_there_is() {
    let spec = json!({"autoscaling": {"minReplicas": 0, "maxReplicas": 2}, "serving": {"maxSequences": 1}});
    let (sender, holds) = holds(table(&spec, &["10.0.0.1", "10.0.0.2"]));
    let [mut first, mut second] = [(); 2].map(|()| holds.enter(&model(&holds, "a", "s"), 0).unwrap());
    assert!(first.turn().await.is_ok() && second.turn().await.is_ok());
    sender.send_replace(table(&spec, &["10.0.0.3"]));
    holds.see(Instant::now());
    first.back(Duration::ZERO);
    let turn = tokio::spawn(async move { (first.turn().await, first) });
    tokio::task::yield_now().await;
    second.back(Duration::ZERO);
    let turn = tokio::time::timeout(BOUNDS.time / 2, turn).await.expect("it is woken");
    assert_eq!(turn.unwrap().0.unwrap(), [at(3)]);
}

/// With one place, as long as an adapter is not loaded.
#[tokio::test(start_paused = true)]
async fn who_waits_for_an_adapter_stops_nobody_and_waits_no_longer_than_others() {
    let spec = json!({"autoscaling": {"minReplicas": 0, "maxReplicas": 2}, "serving": {"maxSequences": 1}});
    let (_sender, holds) = holds(table(&spec, &["10.0.0.1"]));
    let [mut first, mut second] = [(); 2].map(|()| holds.enter(&model(&holds, "a", "s"), 0).unwrap());
    let start = Instant::now();
    first.turn().await.unwrap();
    let again = tokio::spawn(async move {
        first.again(SECOND).await;
        first.turn().await.unwrap();
        first
    });
    second.turn().await.unwrap();
    assert_eq!(start.elapsed(), Duration::ZERO);
    tokio::time::sleep(2 * SECOND).await;
    assert!(!again.is_finished(), "it is behind");
    drop(second);
    let mut first = again.await.unwrap();
    let error = loop {
        first.again(SECOND).await;
        if let Err(error) = first.turn().await {
            break error;
        }
    };
    assert_eq!((error.code, start.elapsed()), ("no_replica", BOUNDS.time));
    drop(first);
    assert!(holds.are_empty());
}

#[tokio::test(start_paused = true)]
async fn who_is_held_for_a_service_that_its_user_stops_is_told_at_once() {
    let (sender, holds) = holds(table(&json!({"replicas": 1}), &["10.0.0.1"]));
    sender.send_replace(table(&json!({"replicas": 1}), &[]));
    holds.see(Instant::now());
    let mut held = holds.enter(&model(&holds, "a", "s"), 0).unwrap();
    let start = Instant::now();
    let turn = tokio::spawn(async move { held.turn().await });
    tokio::task::yield_now().await;
    sender.send_replace(table(&json!({"replicas": 0}), &[]));
    holds.see(start);
    assert_eq!(turn.await.unwrap().unwrap_err().code, "no_replica");
    assert_eq!(start.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn clients_that_come_and_leave_are_news_once_a_second() {
    let (_sender, holds) = holds(table(&automatic(), &[]));
    let begun = holds.begun();
    for seconds in 1..4 {
        for name in ["s", "s", "t", "s"] {
            drop(holds.enter(&model(&holds, "a", name), 0).unwrap());
        }
        assert_eq!(*begun.borrow(), 2 * seconds);
        tokio::time::advance(SECOND).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_that_can_never_be_held_is_told_the_limit() {
    let (_sender, holds) = holds(table(&automatic(), &[]));
    let error = holds.enter(&model(&holds, "a", "s"), BOUNDS.bytes + 1).unwrap_err();
    assert_eq!((error.status.as_u16(), error.code), (413, "request_too_large"));
    assert!(error.message.contains("at most 100 bytes"), "{}", error.message);
    assert!(holds.are_empty());
}

#[tokio::test(start_paused = true)]
async fn a_gateway_that_goes_sends_everybody_away() {
    let (_sender, holds) = holds(table(&automatic(), &[]));
    let mut held = holds.enter(&model(&holds, "a", "s"), 0).unwrap();
    holds.close();
    assert_eq!(held.turn().await.unwrap_err().code, "shutting_down");
    assert_eq!(holds.enter(&model(&holds, "a", "s"), 0).unwrap_err().code, "shutting_down");
}
