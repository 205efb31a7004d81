//! The table: medians over the rounds, and ratios taken round by round, so that a drift of the machine hits both sides.

use std::fmt::Write as _;

use super::fio::Figures;

/// What one job gave on one target, a figure per round.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Series {
    /// The job's name.
    pub job: &'static str,
    /// The target's name.
    pub target: String,
    /// In the order of the rounds.
    pub rounds: Vec<Figures>,
}

/// The middle one; of an even number the mean of the two in the middle. Zero of none.
#[must_use]
pub fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    let (n, half) = (figures.len(), figures.len() / 2);
    match n {
        0 => 0.0,
        _ if n % 2 == 1 => figures[half],
        _ => f64::midpoint(figures[half - 1], figures[half]),
    }
}

/// All series as a Markdown table, jobs in their order, the first target of each job compared with each other one.
#[must_use]
pub fn table(all: &[Series]) -> String {
    let mut text = String::from(
        "| job | target | IOPS | MiB/s | p50 µs | p99 µs | p99.9 µs | CPU µs/request | first against it |\n\
         | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
    );
    for series in all {
        let middle = |f: fn(&Figures) -> f64| median(series.rounds.iter().map(f).collect());
        let cpu: Vec<f64> = series.rounds.iter().filter_map(|f| f.cpu_us).collect();
        let cpu = if cpu.is_empty() { "-".to_owned() } else { format!("{:.1}", median(cpu)) };
        let first = all.iter().find(|s| s.job == series.job).unwrap_or(series);
        let ratio = if first.target == series.target {
            "-".to_owned()
        } else {
            let both = first.rounds.iter().zip(&series.rounds);
            format!("x {:.2}", median(both.filter(|(_, b)| b.iops > 0.0).map(|(a, b)| a.iops / b.iops).collect()))
        };
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "| {} | {} | {:.0} | {:.1} | {:.0} | {:.0} | {:.0} | {cpu} | {ratio} |",
            series.job,
            series.target,
            middle(|f| f.iops),
            middle(|f| f.mib),
            middle(|f| f.p50_us),
            middle(|f| f.p99_us),
            middle(|f| f.p999_us),
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(iops: f64) -> Figures {
        Figures { requests: 1, iops, mib: 0.0, p50_us: 0.0, p99_us: 0.0, p999_us: 0.0, cpu_us: None }
    }

    #[test]
    fn ratios_are_taken_within_a_round_not_between_medians() {
        let one = |target: &str, iops: [f64; 3]| Series {
            job: "j",
            target: target.to_owned(),
            rounds: iops.map(figures).to_vec(),
        };
        // The machine is ten times as fast in the second round, for both.
        let text = table(&[one("a", [100.0, 1000.0, 110.0]), one("b", [200.0, 2000.0, 100.0])]);
        assert!(text.contains("| j | b | 200 |"), "{text}");
        assert!(text.contains("| x 0.50 |"), "{text}");
    }

    #[test]
    fn the_median_of_an_even_number_lies_between_the_two_in_the_middle() {
        assert_eq!(median(vec![4.0, 1.0, 2.0, 100.0]), 3.0);
        assert_eq!(median(vec![]), 0.0);
    }
}
