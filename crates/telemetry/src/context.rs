//! W3C trace context (<https://www.w3.org/TR/trace-context/>) in headers. What a client sends is bounded and checked, and what does not
//! pass goes nowhere.
use std::str::FromStr as _;

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceId, TraceState};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// Of version 00, whose form later ones begin with: `00-<32 hex>-<16 hex>-<2 hex>`.
const LENGTH: usize = 55;
/// What later versions add is read over, up to here.
const LONGEST: usize = 256;
/// As much as every vendor must pass on.
const LONGEST_STATE: usize = 512;

/// The span of another program that these headers name as their parent. A broken `tracestate` is as if there were none; a broken
/// `traceparent`, or two, as if there were neither.
pub fn remote(headers: &HeaderMap) -> Option<SpanContext> {
    let mut all = headers.get_all(TRACEPARENT).iter();
    let parent = all.next()?.to_str().ok()?;
    if all.next().is_some() {
        return None;
    }
    let (trace, span, flags) = parse(parent.trim())?;
    Some(SpanContext::new(trace, span, flags, true, state(headers)))
}

/// Names a span as the parent of whatever a request with these headers leads to, in place of what they name; none: nobody.
pub fn put(span: Option<&SpanContext>, headers: &mut HeaderMap) {
    headers.remove(TRACEPARENT);
    headers.remove(TRACESTATE);
    let Some(span) = span.filter(|span| span.is_valid()) else { return };
    let flags = span.trace_flags() & TraceFlags::SAMPLED;
    let parent = format!("00-{}-{}-{:02x}", span.trace_id(), span.span_id(), flags);
    let Ok(parent) = HeaderValue::try_from(parent) else { return };
    headers.insert(TRACEPARENT, parent);
    let state = span.trace_state().header();
    if let Some(state) = HeaderValue::try_from(state).ok().filter(|state| !state.is_empty()) {
        headers.insert(TRACESTATE, state);
    }
}

fn parse(parent: &str) -> Option<(TraceId, SpanId, TraceFlags)> {
    if parent.len() > LONGEST {
        return None;
    }
    let (known, more) = parent.split_at_checked(LENGTH)?;
    let mut parts = known.split('-');
    let mut part = |digits: usize| {
        let part = parts.next()?;
        let is_hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        (part.len() == digits && part.bytes().all(is_hex)).then_some(part)
    };
    let (version, trace, span, flags) = (part(2)?, part(32)?, part(16)?, part(2)?);
    let whole = match version {
        "00" => more.is_empty(),
        "ff" => false,
        _ => more.is_empty() || more.starts_with('-'),
    };
    let (trace, span) = (TraceId::from_hex(trace).ok()?, SpanId::from_hex(span).ok()?);
    let flags = TraceFlags::new(u8::from_str_radix(flags, 16).ok()?) & TraceFlags::SAMPLED;
    (whole && trace != TraceId::INVALID && span != SpanId::INVALID).then_some((trace, span, flags))
}

fn state(headers: &HeaderMap) -> TraceState {
    let mut list = String::new();
    for value in headers.get_all(TRACESTATE) {
        let Ok(value) = value.to_str() else { return TraceState::NONE };
        if list.len() + value.len() > LONGEST_STATE {
            return TraceState::NONE;
        }
        if !list.is_empty() {
            list.push(',');
        }
        list.push_str(value);
    }
    // The parser takes a member without a key for one.
    if list.split(',').any(|member| member.trim().starts_with('=')) {
        return TraceState::NONE;
    }
    TraceState::from_str(&list).unwrap_or(TraceState::NONE)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    #[rstest]
    #[case::as_it_is(PARENT, PARENT)]
    #[case::not_sampled(
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
    )]
    #[case::flags_that_nobody_knows("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-ff", PARENT)]
    #[case::a_later_version(
        "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-what-the-future-brings",
        PARENT
    )]
    fn a_parent_is_passed_on(#[case] sent: &str, #[case] expected: &str) {
        let mut told =
            headers(&[("traceparent", "another"), ("tracestate", "another=1"), ("te", "trailers")]);
        put(remote(&headers(&[("traceparent", sent)])).as_ref(), &mut told);
        assert_eq!(told, headers(&[("traceparent", expected), ("te", "trailers")]));
    }

    #[rstest]
    #[case::empty("")]
    #[case::short("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-1")]
    #[case::no_trace("00-00000000000000000000000000000000-b7ad6b7169203331-01")]
    #[case::no_span("00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01")]
    #[case::large_letters("00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01")]
    #[case::the_forbidden_version("ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")]
    #[case::more_than_its_version_has("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x")]
    #[case::a_later_version_run_on("01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01x")]
    #[case::signs("00-+af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")]
    #[case::a_word("00-0af7651916cd43dd8448eb211c80319c-b7ad6b716920333-x01")]
    fn what_is_no_parent_goes_nowhere(#[case] sent: &str) {
        let sent = headers(&[("traceparent", sent), ("tracestate", "a=1")]);
        assert_eq!(remote(&sent), None);
        let mut told = sent.clone();
        put(None, &mut told);
        assert!(told.is_empty());
    }

    #[test]
    fn two_parents_and_an_endless_one_are_none() {
        assert_eq!(remote(&headers(&[("traceparent", PARENT), ("traceparent", PARENT)])), None);
        let endless = format!("01{}-{}", &PARENT[2..], "x".repeat(LONGEST));
        assert_eq!(remote(&headers(&[("traceparent", &endless)])), None);
    }

    #[rstest]
    #[case::one(&["rojo=00f067aa0ba902b7"], "rojo=00f067aa0ba902b7")]
    #[case::several_lines(&["a=1, b=2", "t@vendor=3"], "a=1,b=2,t@vendor=3")]
    #[case::no_list(&["nothing"], "")]
    #[case::no_key(&["=1"], "")]
    #[case::large_letters(&["A=1"], "")]
    fn the_state_is_passed_on_where_it_is_one(#[case] sent: &[&str], #[case] expected: &str) {
        let mut sent: Vec<_> = sent.iter().map(|state| ("tracestate", *state)).collect();
        sent.push(("traceparent", PARENT));
        let span = remote(&headers(&sent)).unwrap();
        assert_eq!(span.trace_state().header(), expected);
    }

    #[test]
    fn an_endless_state_is_none() {
        let long = format!("a={}", "x".repeat(250));
        let twice = [("traceparent", PARENT), ("tracestate", &long), ("tracestate", &long)];
        assert_eq!(
            remote(&headers(&twice)).unwrap().trace_state(),
            &TraceState::from_str(&format!("{long},{long}")).unwrap()
        );
        let thrice = [&twice[..], &[("tracestate", "b=123456789")]].concat();
        assert_eq!(remote(&headers(&thrice)).unwrap().trace_state(), &TraceState::NONE);
    }
}
