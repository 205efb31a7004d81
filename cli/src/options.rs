//! Volume options on the command line: the table, and checks before anything is sent. The options themselves are
//! `mortar_proto`'s, which the servers check by too.

use comfy_table::{ColumnConstraint, ContentArrangement, Width};
use mortar_proto::metadata::options::{OPTIONS, VolumeOption, check as check_value, option};
use serde_json::{Value, json};

use crate::failure::{Failure, Outcome};
use crate::output::{table, text_of};

/// All options, in the table's order.
pub fn all() -> &'static [VolumeOption] {
    OPTIONS
}

/// The option with this key.
///
/// # Errors
/// When there is none; names the nearest.
pub fn find(key: &str) -> Outcome<&'static VolumeOption> {
    check_value(key, None).map_err(Failure::Usage)?;
    option(key).ok_or_else(|| Failure::usage(format!("there is no option {key:?}")))
}

/// Checks a key and a value for it.
///
/// # Errors
/// When there is no such option, or the value is not of its type or range.
pub fn check(key: &str, value: &str) -> Outcome {
    let found = find(key)?;
    check_value(key, Some(value)).map_err(|why| {
        Failure::usage(format!("{why}. The default is {}; 'mortar volume options' tells what it means.", found.default))
    })
}

/// `volume options --json`
pub fn table_json() -> Value {
    let row = |option: &VolumeOption| json!({ "key": option.key, "default": option.default, "range": option.kind.range(), "meaning": option.meaning });
    json!({ "options": all().iter().map(row).collect::<Vec<_>>() })
}

/// `volume options`
pub fn table_text() -> String {
    let mut rows = table(&["option", "default", "range", "meaning"]);
    for option in all() {
        rows.add_row(vec![option.key, option.default, &option.kind.range(), option.meaning]);
    }
    // Meanings are sentences: wrapped, so that the rows stay readable on a terminal and in a mail.
    rows.set_content_arrangement(ContentArrangement::Dynamic).set_width(120);
    if let Some(column) = rows.column_mut(0) {
        column.set_constraint(ColumnConstraint::LowerBoundary(Width::Fixed(20)));
    }
    text_of(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_option_names_the_nearest() {
        let refusal = find("io-timout").unwrap_err();
        assert!(refusal.to_string().contains("the nearest is \"io-timeout\""), "{refusal}");
        assert_eq!(refusal.exit_code(), 2);
    }

    #[test]
    fn every_option_has_a_default_that_is_allowed_and_says_what_it_means() {
        for option in all() {
            check_value(option.key, Some(option.default)).unwrap();
            assert!(!option.kind.range().is_empty() && !option.meaning.is_empty(), "{}", option.key);
        }
    }
}
