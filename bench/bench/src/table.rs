//! Tables in plain text: the first column to the left, numbers to the right.

/// Lays out `rows` below `head`. A row with one cell is a heading of its own.
pub fn text(head: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        rows.iter()
            .filter(|row| row.len() > 1)
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .chain([head[column].chars().count()])
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let mut line = String::new();
        for (n, (cell, &width)) in cells.iter().zip(&widths).enumerate() {
            match n {
                0 => line.push_str(&format!("{cell:<width$}")),
                _ => line.push_str(&format!("  {cell:>width$}")),
            }
        }
        line.trim_end().to_owned() + "\n"
    };
    let mut text = line(head.to_vec());
    let rule: Vec<String> = widths.iter().map(|&w| "-".repeat(w)).collect();
    text.push_str(&line(rule.iter().map(String::as_str).collect()));
    for row in rows {
        text.push_str(&line(row.iter().map(String::as_str).collect()));
    }
    text
}

/// A number of milliseconds with three digits or more.
pub fn milliseconds(value: Option<f64>) -> String {
    match value {
        None => "-".into(),
        Some(value) if value < 10.0 => format!("{value:.2}"),
        Some(value) if value < 100.0 => format!("{value:.1}"),
        Some(value) => format!("{value:.0}"),
    }
}

/// A ratio, e.g. `2.5x`.
pub fn ratio(value: Option<f64>) -> String {
    match value {
        None => "-".into(),
        Some(value) if value < 100.0 => format!("{value:.2}x"),
        Some(value) => format!("{value:.0}x"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let rows = vec![
            vec!["integer".into()],
            vec!["crc32".into(), "1.5".into()],
            vec!["x".into(), "100.25".into()],
        ];
        assert_eq!(
            text(&["name", "ms"], &rows),
            "name       ms\n-----  ------\ninteger\ncrc32     1.5\nx      100.25\n"
        );
    }
}
