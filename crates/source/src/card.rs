//! What a model card (`README.md`) says of the licence, in its YAML front matter.

/// Bytes of a card that are looked at.
const MOST: usize = 64 << 10;

/// The licence of a model, as the Hugging Face hub writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CardLicense {
    /// `license`, lower case: an identifier of the hub, e.g. `apache-2.0`, or `other`.
    pub license: String,
    /// `license_name`, lower case; read where `license` is `other`.
    pub name: Option<String>,
    /// `license_link`: a URL or a file beside the card; read where `license` is `other`.
    pub link: Option<String>,
}

/// The licence that a model card names; none where it has no front matter or names none in a form that is known.
pub fn card_license(card: &[u8]) -> Option<CardLicense> {
    let text = String::from_utf8_lossy(&card[..card.len().min(MOST)]).into_owned();
    let mut lines = text.trim_start_matches('\u{feff}').lines();
    if lines.next()?.trim_end() != "---" {
        return None;
    }
    let (mut license, mut name, mut link) = (None, None, None);
    for line in lines.take_while(|line| line.trim_end() != "---") {
        // Only top-level keys: an indented one belongs to something else.
        match line.split_once(':') {
            Some(("license", value)) => license = word(value, 64, b"-._+"),
            Some(("license_name", value)) => name = word(value, 64, b"-._+"),
            Some(("license_link", value)) => link = word(value, 256, b"-._+/:%~?=&"),
            _ => {}
        }
    }
    let license = license?.to_ascii_lowercase();
    let other = license == "other";
    let name = name.map(|name| name.to_ascii_lowercase()).filter(|_| other);
    Some(CardLicense { license, name, link: link.filter(|_| other) })
}

/// A plain or quoted YAML scalar of letters, digits and `marks`.
fn word(value: &str, most: usize, marks: &[u8]) -> Option<String> {
    let value = value.split(" #").next().unwrap_or_default().trim().trim_matches(['"', '\'']);
    let plain = |b: u8| b.is_ascii_alphanumeric() || marks.contains(&b);
    (!value.is_empty() && value.len() <= most && value.bytes().all(plain)).then(|| value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case("---\nlanguage: en\nlicense: Apache-2.0\n---\n# x", Some("apache-2.0"))]
    #[case("---\r\nlicense: \"llama3.2\" # see below\r\n---\r\n", Some("llama3.2"))]
    #[case("---\nlicense: other\nlicense_name: My-own\n---", Some("my-own"))]
    #[case("---\nlicense: mit\nlicense_name: not-read\n---", Some("mit"))]
    #[case("---\nmodel:\n  license: mit\n---", None)]
    #[case("# x\nlicense: mit", None)]
    #[case("---\n---\nlicense: mit", None)]
    #[case("---\nlicense: <script>\n---", None)]
    #[case("", None)]
    fn licenses(#[case] card: &str, #[case] expected: Option<&str>) {
        let found = card_license(card.as_bytes()).map(|found| found.name.unwrap_or(found.license));
        assert_eq!(found.as_deref(), expected);
    }

    #[test]
    fn a_licence_of_ones_own_has_a_link() {
        let card = "---\nlicense: other\nlicense_name: own\nlicense_link: https://a.example/L?v=1\n---\n";
        let found = card_license(card.as_bytes()).unwrap();
        assert_eq!(found.link.as_deref(), Some("https://a.example/L?v=1"));
        let card = card.replace("https://a.example/L?v=1", "\"a\\nb: c\"");
        assert_eq!(card_license(card.as_bytes()).unwrap().link, None);
    }
}
