//! Tables, for a terminal and for a page.

use serde::Serialize;

/// Rows under headings; the first column holds words, the others figures.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Table {
    /// What stands above it.
    pub title: String,
    /// One for each column.
    pub headings: Vec<String>,
    /// As many cells each.
    pub rows: Vec<Vec<String>>,
    /// Lines below it.
    pub notes: Vec<String>,
}

impl Table {
    /// Without rows yet.
    pub fn new(title: impl Into<String>, headings: &[&str]) -> Self {
        let headings = headings.iter().map(|&heading| heading.to_owned()).collect();
        Self { title: title.into(), headings, rows: Vec::new(), notes: Vec::new() }
    }

    /// Aligned with spaces.
    pub fn text(&self) -> String {
        let lines = std::iter::once(&self.headings).chain(&self.rows);
        let mut widths = vec![0; self.headings.len()];
        for line in lines.clone() {
            for (width, cell) in widths.iter_mut().zip(line) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut text = format!("{}\n", self.title);
        for line in lines {
            let cells = line.iter().zip(&widths).enumerate();
            let aligned = cells.map(|(column, (cell, &width))| {
                if column == 0 { format!("  {cell:<width$}") } else { format!("  {cell:>width$}") }
            });
            text.push_str(aligned.collect::<String>().trim_end());
            text.push('\n');
        }
        self.notes.iter().for_each(|note| text.push_str(&format!("  {note}\n")));
        text
    }

    /// As a section of a page.
    pub fn markdown(&self) -> String {
        let line = |cells: &[String]| {
            let cells: Vec<String> = cells.iter().map(|cell| cell.replace('|', "\\|")).collect();
            format!("| {} |\n", cells.join(" | "))
        };
        let rule: Vec<&str> = (0..self.headings.len()).map(|i| if i == 0 { "---" } else { "---:" }).collect();
        let mut text = format!("### {}\n\n{}| {} |\n", self.title, line(&self.headings), rule.join(" | "));
        self.rows.iter().for_each(|row| text.push_str(&line(row)));
        text.push('\n');
        self.notes.iter().for_each(|note| text.push_str(&format!("{note}\n\n")));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new("Speed", &["What", "tokens/s"]);
        table.rows = vec![vec!["prefill".into(), "1000".into()], vec!["a|b".into(), "7.1".into()]];
        table.notes = vec!["One machine.".into()];
        table
    }

    #[test]
    fn columns_of_figures_end_under_each_other() {
        let text = "Speed\n  What     tokens/s\n  prefill      1000\n  a|b           7.1\n  One machine.\n";
        assert_eq!(table().text(), text);
    }

    #[test]
    fn a_page_gets_headings_a_rule_and_every_row() {
        let page = "### Speed\n\n| What | tokens/s |\n| --- | ---: |\n| prefill | 1000 |\n| a\\|b | 7.1 |\n\nOne machine.\n\n";
        assert_eq!(table().markdown(), page);
    }
}
