//! Where traces go, by OpenTelemetry's own variables.
use clap::Args;

/// The collector of a program's traces. Its URL may have a password in it: no help shows the variables' values.
#[derive(Clone, Debug, Default, Args)]
pub struct CollectorOptions {
    /// Collector of traces (OTLP over HTTP), e.g. http://collector:4318; absent: none are made. A request whose `traceparent` says so
    /// is traced; of the others, as many as OTEL_TRACES_SAMPLER and OTEL_TRACES_SAMPLER_ARG say.
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT", hide_env_values = true)]
    otlp_endpoint: Option<String>,
    /// URL that traces are sent to as it stands, where it is not `/v1/traces` of the collector.
    #[arg(long, env = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", hide_env_values = true)]
    otlp_traces_endpoint: Option<String>,
}

impl CollectorOptions {
    /// URL that traces are sent to; an empty variable is none.
    pub fn url(&self) -> Option<String> {
        let given = |option: &Option<String>| option.clone().filter(|url| !url.is_empty());
        let base = || given(&self.otlp_endpoint);
        given(&self.otlp_traces_endpoint)
            .or_else(|| base().map(|base| format!("{}/v1/traces", base.trim_end_matches('/'))))
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::nothing(None, None, None)]
    #[case::empty(Some(""), Some(""), None)]
    #[case::the_path_is_added(Some("http://c:4318"), None, Some("http://c:4318/v1/traces"))]
    #[case::below_a_path(Some("http://c/otlp/"), Some(""), Some("http://c/otlp/v1/traces"))]
    #[case::as_it_stands(None, Some("http://t:9/in"), Some("http://t:9/in"))]
    #[case::traces_own_wins(Some("http://c:4318"), Some("http://t:9/"), Some("http://t:9/"))]
    fn traces_go_to(#[case] base: Option<&str>, #[case] own: Option<&str>, #[case] expected: Option<&str>) {
        let options = CollectorOptions {
            otlp_endpoint: base.map(str::to_owned),
            otlp_traces_endpoint: own.map(str::to_owned),
        };
        assert_eq!(options.url().as_deref(), expected);
    }

    #[test]
    fn help_names_the_variables_and_not_what_they_say() {
        for argument in CollectorOptions::augment_args(clap::Command::new("test")).get_arguments() {
            assert!(
                argument.get_env().is_some() && argument.is_hide_env_values_set(),
                "{}",
                argument.get_id()
            );
        }
    }
}
