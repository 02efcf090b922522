//! The page as a person sees it, in Debian's Chromium: `cargo xtask test --only page` installs it.
use lathe_contract::new_key;
use serde_json::json;

use super::super::browser::Browser;
use super::super::replica::{Act, Asked, Replica, error, events};
use super::super::rig::{Rig, Setup, soon, start_with};
use super::{at_step, chat, losses_until, plot, tenants, whole_chat};
use crate::testing::job;

/// The text of an element.
fn text(selector: &str) -> String {
    format!("document.querySelector('{selector}').innerText")
}

fn answered(asked: &Asked) -> String {
    match asked.body["model"].as_str().unwrap() {
        "tone" => whole_chat(&["Gladly! ", "The red lamp ", "is 19 euros."]),
        _ => whole_chat(&["The lamp ", "costs ", "19 EUR."]),
    }
}

struct Shop {
    replica: Replica,
    rig: Rig,
    browser: Browser,
}

impl Shop {
    /// Two tenants on a replica, and a browser at the page, which asks for a key.
    async fn open() -> Self {
        let shop = Self::open_with(tenants()).await;
        shop.browser.until("document.querySelector('#key')").await;
        shop
    }

    async fn open_with(setup: Setup) -> Self {
        let replica = Replica::start(Act::Answers(answered)).await;
        let rig = start_with(&[replica.address], setup).await;
        rig.cluster.jobs.saw(&at_step(120));
        plot(&rig, losses_until(120)).await;
        let browser = Browser::start().await;
        browser.open(&rig.url).await;
        Self { replica, rig, browser }
    }

    /// Types a key into the form, and shows what it opens.
    async fn enter(&self, key: u8) {
        self.browser.types(&new_key([key; 32]).0).await;
        self.browser.press("Enter").await;
        self.browser.until("document.querySelector('#services')").await;
        self.browser.until("document.querySelector('#model').options.length > 0").await;
    }

    /// Nothing was wrong with the page from its beginning.
    fn quiet(&self) {
        let troubles = self.browser.troubles(&self.rig.url);
        assert!(troubles.is_empty(), "{troubles:#?}");
    }
}

#[tokio::test]
#[ignore = "needs Chromium: cargo xtask test --only page"]
async fn without_a_key_there_is_the_form_and_a_wrong_one_is_told_so() {
    let shop = Shop::open().await;
    let Shop { browser, rig, .. } = &shop;
    let seen = browser.text().await;
    assert!(seen.contains("API key") && !seen.contains("Services") && !seen.contains("team-"), "{seen}");
    assert_eq!(browser.value("document.querySelectorAll('main section').length").await, 0);
    browser.picture("door").await;
    shop.quiet();
    browser.types("lathe-wrong").await;
    browser.press("Enter").await;
    browser.until(&format!("{}.includes('is not known here')", text("#key-error"))).await;
    assert_eq!(browser.value("document.activeElement.id").await, "key");
    assert_eq!(browser.value("sessionStorage.length").await, 0);
    // What no header can hold is not sent.
    browser.value("document.querySelector('#key').value = ''").await;
    browser.types("lathe-\u{43a}").await;
    browser.press("Enter").await;
    browser.until(&format!("{}.includes('This is no key')", text("#key-error"))).await;
    // It went out in a header, and stands in no URL.
    assert!(!browser.asked(&rig.url).join(" ").contains("wrong"));
    assert_eq!(browser.value("document.cookie + location.search + location.hash").await, "");
}

#[tokio::test]
#[ignore = "needs Chromium: cargo xtask test --only page"]
async fn a_key_shows_its_namespace_as_it_changes_and_nothing_of_another() {
    let shop = Shop::open().await;
    let Shop { browser, rig, .. } = &shop;
    shop.enter(1).await;
    browser.until("document.querySelectorAll('svg.curve').length === 1").await;
    let seen = browser.text().await;
    for wanted in [
        "Namespace team-a, key k",
        "88 tokens/s",
        "1,240 tokens/s",
        "2 of 3 ready",
        "0 of 3 nvidia-h200 free",
        "Unschedulable",
        "step 120 of 300",
        "9m40s left",
        "Perplexity",
        "21.500",
        "3.250",
        "team-a/tone",
    ] {
        assert!(seen.contains(wanted), "{wanted} is not in {seen}");
    }
    assert!(!seen.contains("secret") && !seen.contains("team-b"), "{seen}");
    browser.value("document.querySelector('#services summary:not([hidden] *)').click()").await;
    let decisions = browser.value(&text("details[open] .decisions")).await;
    let decisions = decisions.as_str().unwrap();
    assert!(
        decisions.contains("1 → 3 Above target") && decisions.contains("190 of 210 tokens/s are used."),
        "{decisions}"
    );
    let words = browser.value("document.querySelector('svg.curve').getAttribute('aria-label')").await;
    assert_eq!(words, "Loss by step: 3.115 after step 5, 0.672 after step 120, lowest 0.672.");
    assert_eq!(browser.value("document.querySelector('svg.curve polyline').points.length").await, 24);

    // A job goes on, another one comes, one goes; an opened page follows, and what has the focus keeps it.
    browser.value("document.querySelector('#services details[open] summary').focus()").await;
    rig.cluster.jobs.saw(&at_step(200));
    plot(rig, losses_until(125)).await;
    rig.cluster.jobs.saw(&job("team-a", "fresh", json!({})));
    rig.cluster.jobs.saw(&job("team-b", "secret-two", json!({})));
    browser.until(&format!("{}.includes('step 200 of 300')", text("#jobs"))).await;
    browser.until("document.querySelector('svg.curve polyline').points.length === 25").await;
    assert!(browser.value(&text("#jobs")).await.as_str().unwrap().contains("fresh"));
    assert_eq!(browser.value("document.activeElement.tagName").await, "SUMMARY");
    assert_eq!(browser.value("document.querySelectorAll('details[open] .decisions li').length").await, 2);
    // The same tab knows the key when it is loaded again.
    browser.call("Page.reload", json!({})).await;
    browser.until(&format!("{}.includes('fresh')", text("#jobs"))).await;
    assert!(!browser.text().await.contains("secret"));
    // Another tenant's turn: of the first one nothing stays.
    browser.value("document.querySelector('#leave').click()").await;
    browser.until("document.querySelector('#key')").await;
    assert!(!browser.text().await.contains("team-a"));
    shop.enter(2).await;
    let seen = browser.text().await;
    assert!(
        seen.contains("secret-plans") && seen.contains("secret-two") && !seen.contains("team-a"),
        "{seen}"
    );
    shop.quiet();
}

#[tokio::test]
#[ignore = "needs Chromium: cargo xtask test --only page"]
async fn where_no_key_is_asked_for_there_is_no_form() {
    let shop = Shop::open_with(Setup { open: true, ..tenants() }).await;
    let Shop { browser, .. } = &shop;
    browser.until("document.querySelectorAll('#services > li').length === 3").await;
    let seen = browser.text().await;
    assert!(seen.contains("this gateway asks for no key") && seen.contains("team-b/secret-plans"), "{seen}");
    assert!(!seen.contains("API key") && !seen.contains("Forget the key"), "{seen}");
    shop.quiet();
}

#[tokio::test]
#[ignore = "needs Chromium: cargo xtask test --only page"]
async fn an_answer_is_shown_as_it_comes_and_stop_ends_it_at_the_replica() {
    let shop = Shop::open().await;
    let Shop { browser, replica, .. } = &shop;
    shop.enter(1).await;
    // What looks like HTML is text.
    let pieces = chat(&["Half an", " <b>answer</b>"]);
    replica.now(Act::SaysAndStalls(events(&pieces.iter().map(String::as_str).collect::<Vec<_>>())));
    browser.value("document.querySelector('#prompt').focus()").await;
    browser.types("How much is the lamp?").await;
    browser.press("Control+Enter").await;
    // The replica says no more, and this is here.
    browser.until(&format!("{} === 'Half an <b>answer</b>'", text(".answer .text"))).await;
    assert_eq!(browser.value("document.querySelector('.log').getAttribute('aria-busy')").await, "true");
    browser.value("document.querySelector('#stop').click()").await;
    soon(replica.left()).await;
    browser.until(&format!("{} === 'Stopped.'", text(".answer .hint"))).await;
    shop.rig.until_idle().await;

    // What was said belongs to the chat.
    replica.now(Act::Answers(answered));
    browser.value("document.querySelector('#system').value = 'Be brief.'").await;
    browser.types("And the green one?").await;
    browser.press("Control+Enter").await;
    browser.until("document.querySelectorAll('.answer')[1].innerText.includes('11 tokens read · 5 written · first after')").await;
    let asked = replica.asked().pop().unwrap().body;
    let roles: Vec<_> = asked["messages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| (m["role"].as_str().unwrap(), m["content"].as_str().unwrap()))
        .collect();
    assert_eq!(
        roles,
        [
            ("system", "Be brief."),
            ("user", "How much is the lamp?"),
            ("assistant", "Half an <b>answer</b>"),
            ("user", "And the green one?"),
        ]
    );
    assert_eq!(
        (&asked["max_tokens"], &asked["temperature"], &asked["stream"]),
        (&json!(256), &json!(0.7), &json!(true))
    );

    // An error is told in the words of who refuses; here Chromium's console has its status as well.
    shop.quiet();
    replica.now(Act::Says(error(400, "The prompt is longer than the model's context.", "")));
    browser.types("Again").await;
    browser.press("Control+Enter").await;
    browser.until("document.querySelectorAll('.answer')[2].innerText === 'The prompt is longer than the model\\'s context.'").await;
    // One in the middle of a stream too, and an end without [DONE].
    let broken = "data: {\"error\": {\"message\": \"The replica was lost.\"}}\n\n";
    replica.now(Act::Says(events(&[&chat(&["Half"])[0], broken]) + "0\r\n\r\n"));
    browser.types("Again").await;
    browser.press("Control+Enter").await;
    browser
        .until("document.querySelectorAll('.answer')[3].innerText.includes('The replica was lost.')")
        .await;
    replica.now(Act::Says(events(&[&chat(&["Half"])[0]]) + "0\r\n\r\n"));
    browser.types("Again").await;
    browser.press("Control+Enter").await;
    browser.until("document.querySelectorAll('.answer')[4].innerText.includes('The answer broke off')").await;
    // What a stream holds after an error is waited for by nobody.
    replica.now(Act::SaysAndStalls(events(&[broken])));
    browser.types("Again").await;
    browser.press("Control+Enter").await;
    soon(replica.left()).await;
    // Whoever forgets the key asks nothing more with it.
    let half = chat(&["Half"]);
    replica.now(Act::SaysAndStalls(events(&[&half[0]])));
    browser.until("!document.querySelector('#send').disabled").await;
    browser.types("Again").await;
    browser.press("Control+Enter").await;
    browser.until("document.querySelectorAll('.answer')[6].innerText.includes('Half')").await;
    browser.value("document.querySelector('#leave').click()").await;
    soon(replica.left()).await;
    shop.rig.until_idle().await;
}

#[tokio::test]
#[ignore = "needs Chromium: cargo xtask test --only page"]
async fn a_gateway_that_does_not_answer_for_a_moment_forgets_no_key() {
    let shop = Shop::open_with(Setup { per_key: 1, ..tenants() }).await;
    let Shop { browser, rig, .. } = &shop;
    browser.until("document.querySelector('#key')").await;
    shop.enter(1).await;
    let place = async {
        loop {
            match rig.places.enter(Some(&"k".into())) {
                Ok(place) => break place,
                Err(_) => tokio::task::yield_now().await,
            }
        }
    };
    let place = soon(place).await;
    browser.call("Page.reload", json!({})).await;
    browser.until("document.body.innerText.includes('This key is at its share')").await;
    drop(place);
    browser.until("document.querySelector('#services')").await;
}

#[tokio::test]
#[ignore = "needs Chromium: cargo xtask test --only page"]
async fn base_and_adapter_answer_side_by_side_by_keyboard_alone() {
    let shop = Shop::open().await;
    let Shop { browser, replica, .. } = &shop;
    shop.enter(1).await;
    let focus = || browser.value("document.activeElement.id || document.activeElement.tagName");
    // From the beginning of the page on, every stop is seen and none holds the focus.
    browser.value("document.activeElement.blur()").await;
    let mut stops = Vec::new();
    while stops.last().is_none_or(|stop| stop != "model") && stops.len() < 30 {
        browser.press("Tab").await;
        stops.push(focus().await.as_str().unwrap().to_owned());
        let outline = "getComputedStyle(document.activeElement).outlineStyle !== 'none'";
        assert_eq!(browser.value(outline).await, true, "{stops:?}");
    }
    assert_eq!(stops.last().unwrap(), "model", "{stops:?}");
    browser.press("Tab").await;
    assert_eq!(focus().await, "beside");
    // The second of: nobody, the base, the adapter.
    for _ in 0..2 {
        browser.press("ArrowDown").await;
    }
    assert_eq!(browser.value("document.querySelector('#beside').value").await, "team-a/tone");
    for stop in ["tokens", "temperature", "SUMMARY", "prompt"] {
        browser.press("Tab").await;
        assert_eq!(focus().await, stop);
    }
    browser.types("How much is the red lamp?").await;
    browser.press("Tab").await;
    assert_eq!(focus().await, "send");
    browser.press("Enter").await;
    browser
        .until(
            "[...document.querySelectorAll('.answer .text')].map((p) => p.innerText).join('|') === \
        'The lamp costs 19 EUR.|Gladly! The red lamp is 19 euros.'",
        )
        .await;
    browser.until("document.querySelector('#stop').disabled").await;
    assert_eq!(
        browser.value("[...document.querySelectorAll('.side h3')].map((h) => h.innerText).join()").await,
        "team-a/support,team-a/tone"
    );
    // The next message can be written at once.
    assert_eq!(focus().await, "prompt");
    let mut models: Vec<_> = replica.asked().iter().map(|asked| asked.body["model"].clone()).collect();
    models.sort_by_key(ToString::to_string);
    assert_eq!(models, ["support", "tone"]);
    browser.press("Shift+Tab").await;
    assert_eq!(focus().await, "SUMMARY");
    shop.quiet();

    // Two beside each other where there is room, one below the other on a phone; nothing is wider than the screen.
    let columns = "new Set([...document.querySelectorAll('.side')].map((side) => side.offsetLeft)).size";
    for (name, scheme, width, phone, side_by_side) in [
        ("desktop-light", "light", 1100, false, 2),
        ("desktop-dark", "dark", 1100, false, 2),
        ("phone", "light", 360, true, 1),
        ("phone-dark", "dark", 360, true, 1),
    ] {
        browser.size(width, 900, phone).await;
        let features = json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]});
        browser.call("Emulation.setEmulatedMedia", features).await;
        assert_eq!(browser.value(columns).await, side_by_side, "{name}");
        assert_eq!(browser.value("innerWidth").await, width, "{name}");
        let wider = "document.documentElement.scrollWidth - innerWidth";
        assert!(browser.value(wider).await.as_i64().unwrap() <= 0, "{name} is wider than its screen");
        browser.value("document.querySelector('#services details:not([hidden])').open = true").await;
        browser.picture(name).await;
    }
    shop.quiet();
}
