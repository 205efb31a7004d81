//! The table of volume options: typed, few, live.

use super::state::Volume;

/// Owner of the root directory.
pub const OWNER_UID: &str = "storage.owner-uid";
/// Group of the root directory.
pub const OWNER_GID: &str = "storage.owner-gid";

/// What values an option takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A whole number, from and to.
    Number(u64, u64),
    /// A time in milliseconds, from and to; written as `500ms`, `1.5s`, `2m`, `12h` or `30d`.
    Time(u64, u64),
    /// A word that stands for no time, or a time in milliseconds, from and to.
    WordOrTime(&'static str, u64, u64),
    /// Bytes a second; written as `64M`; 0: no limit.
    Rate,
    /// Addresses and networks, separated by commas, or `*`.
    Addresses,
}

/// One option.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VolumeOption {
    /// Its name.
    pub key: &'static str,
    /// What values it takes.
    pub kind: Kind,
    /// What holds when it is not set.
    pub default: &'static str,
    /// What it does, for the administrator.
    pub meaning: &'static str,
}

/// All options, as `mortar volume options` prints them.
pub const OPTIONS: &[VolumeOption] = &[
    VolumeOption {
        key: OWNER_UID,
        kind: Kind::Number(0, u32::MAX as u64 - 1),
        default: "0",
        meaning: "owner of the volume's root directory (107 or 64055 for QEMU, say); persistent",
    },
    VolumeOption {
        key: OWNER_GID,
        kind: Kind::Number(0, u32::MAX as u64 - 1),
        default: "0",
        meaning: "group of the volume's root directory; persistent",
    },
    VolumeOption {
        key: "storage.reserve",
        kind: Kind::Number(0, 50),
        default: "1",
        meaning: "percentage of each brick's file system that is kept free: writes that need new space get ENOSPC below it",
    },
    VolumeOption {
        key: "auth.allow",
        kind: Kind::Addresses,
        default: "*",
        meaning: "addresses and networks (CIDR) that may mount the volume, separated by commas; * is everybody",
    },
    VolumeOption {
        key: "io-timeout",
        kind: Kind::Time(200, 120_000),
        default: "2s",
        meaning: "a brick that does not answer a client for this long is put out of its replica set",
    },
    VolumeOption {
        key: "read-lease",
        kind: Kind::Time(200, 30_000),
        default: "1s",
        meaning: "how long a brick may serve reads without hearing from the leader; a brick that vanishes is put out after it",
    },
    VolumeOption {
        key: "session-ttl",
        kind: Kind::Time(2_000, 600_000),
        default: "15s",
        meaning: "a client that is not heard for this long loses its leases",
    },
    VolumeOption {
        key: "no-quorum",
        kind: Kind::WordOrTime("wait", 1_000, 86_400_000),
        default: "wait",
        meaning: "what I/O does when too few bricks are there: wait for ever, or fail with EIO after a time",
    },
    VolumeOption {
        key: "repair.rate",
        kind: Kind::Rate,
        default: "0",
        meaning: "bytes a second that each client repairs at most; 0: no limit but what applications leave",
    },
    VolumeOption {
        key: "scrub.rate",
        kind: Kind::Rate,
        default: "20M",
        meaning: "bytes a second that each brick reads at most while it is scrubbed; 0 is no limit",
    },
    VolumeOption {
        key: "scrub.interval",
        kind: Kind::WordOrTime("never", 3_600_000, 365 * 86_400_000),
        default: "30d",
        meaning: "from the end of a scrub to the beginning of the next: all data is read and compared with its checksums and with \
            the other bricks; never: only when it is told to",
    },
];

impl Kind {
    /// The type and range, for people.
    #[must_use]
    pub fn range(&self) -> String {
        match self {
            Self::Number(from, to) => format!("{from}..{to}"),
            Self::Time(from, to) => format!("{}..{}", time_text(*from), time_text(*to)),
            Self::WordOrTime(word, from, to) => format!("{word}, {}..{}", time_text(*from), time_text(*to)),
            Self::Rate => "0, 64K..100G".into(),
            Self::Addresses => "*, or addresses and a.b.c.d/n, separated by commas".into(),
        }
    }

    /// The value as a number: of times, milliseconds (a word is 0); of addresses, 0.
    ///
    /// # Errors
    /// What is wrong with it, to follow the value in a sentence.
    fn parse(&self, text: &str) -> Result<u64, String> {
        let within = |number: Option<u64>, from: u64, to: u64| match number {
            Some(n) if (from..=to).contains(&n) => Ok(n),
            Some(_) => Err(format!("is out of range; it must be {}", self.range())),
            None => Err(format!("is not of its type; it must be {}", self.range())),
        };
        match *self {
            Self::Number(from, to) => within(text.parse().ok(), from, to),
            Self::Time(from, to) => within(time_ms(text), from, to),
            Self::WordOrTime(word, ..) if text == word => Ok(0),
            Self::WordOrTime(_, from, to) => within(time_ms(text), from, to),
            Self::Rate => match bytes(text) {
                Some(0) => Ok(0),
                number => within(number, 64 << 10, 100 << 30),
            },
            Self::Addresses => match text.split(',').map(str::trim).find(|a| *a != "*" && network(a).is_none()) {
                None => Ok(0),
                Some(bad) => Err(format!("has {bad:?} in it, which is no address; it must be {}", self.range())),
            },
        }
    }
}

/// The option of this name.
#[must_use]
pub fn option(key: &str) -> Option<&'static VolumeOption> {
    OPTIONS.iter().find(|o| o.key == key)
}

/// May this be set?
///
/// # Errors
/// The sentence for the administrator; for an unknown option it names the nearest.
pub fn check(key: &str, value: Option<&str>) -> Result<(), String> {
    let Some(option) = option(key) else {
        let nearest = OPTIONS.iter().min_by_key(|o| distance(o.key, key)).map_or("", |o| o.key);
        return Err(format!(
            "there is no option {key:?}; the nearest is {nearest:?} (`mortar volume options` lists all)"
        ));
    };
    match value {
        Some(value) => match option.kind.parse(value.trim()) {
            Ok(_) => Ok(()),
            Err(why) => Err(format!("{value:?} for option {key} {why}")),
        },
        None => Ok(()),
    }
}

/// A volume's options, parsed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    /// `storage.owner-uid`
    pub owner_uid: u32,
    /// `storage.owner-gid`
    pub owner_gid: u32,
    /// `storage.reserve`, in percent
    pub reserve_percent: u64,
    /// `auth.allow`
    pub auth_allow: String,
    /// `io-timeout`
    pub io_timeout_ms: u64,
    /// `read-lease`
    pub read_lease_ms: u64,
    /// `session-ttl`
    pub session_ttl_ms: u64,
    /// `no-quorum`; `None`: wait
    pub no_quorum_ms: Option<u64>,
    /// `repair.rate`, in bytes a second; 0: no limit
    pub repair_rate: u64,
    /// `scrub.rate`, in bytes a second; 0: no limit
    pub scrub_rate: u64,
    /// `scrub.interval`; `None`: never
    pub scrub_interval_s: Option<u64>,
}

impl Options {
    /// The options of a volume.
    #[must_use]
    pub fn of(volume: &Volume) -> Self {
        Self::from_texts(|key| volume.options.get(key).map(String::as_str))
    }

    /// What holds when nothing is set.
    #[must_use]
    pub fn defaults() -> Self {
        Self::from_texts(|_| None)
    }

    fn from_texts<'a>(set: impl Fn(&str) -> Option<&'a str>) -> Self {
        let number = |key: &str| {
            option(key).map_or(0, |o| {
                // What is set was checked when it was set; a default always parses.
                set(key).and_then(|t| o.kind.parse(t).ok()).unwrap_or_else(|| o.kind.parse(o.default).unwrap_or(0))
            })
        };
        Self {
            owner_uid: number(OWNER_UID) as u32,
            owner_gid: number(OWNER_GID) as u32,
            reserve_percent: number("storage.reserve"),
            auth_allow: set("auth.allow").unwrap_or("*").to_owned(),
            io_timeout_ms: number("io-timeout"),
            read_lease_ms: number("read-lease"),
            session_ttl_ms: number("session-ttl"),
            no_quorum_ms: Some(number("no-quorum")).filter(|ms| *ms > 0),
            repair_rate: number("repair.rate"),
            scrub_rate: number("scrub.rate"),
            scrub_interval_s: Some(number("scrub.interval") / 1000).filter(|s| *s > 0),
        }
    }

    /// May a client from this address mount `[auth.allow]`?
    #[must_use]
    pub fn allows(&self, address: core::net::IpAddr) -> bool {
        let address = address.to_canonical();
        self.auth_allow.split(',').map(str::trim).any(|a| a == "*" || network(a).is_some_and(|n| n.contains(address)))
    }
}

/// An address or network.
struct Network {
    address: core::net::IpAddr,
    bits: u32,
}

impl Network {
    fn contains(&self, other: core::net::IpAddr) -> bool {
        use core::net::IpAddr::{V4, V6};
        let equal = |a: u128, b: u128, width: u32| self.bits == 0 || (a ^ b) >> (width - self.bits) == 0;
        match (self.address, other) {
            (V4(a), V4(b)) => equal(u32::from(a).into(), u32::from(b).into(), 32),
            (V6(a), V6(b)) => equal(a.into(), b.into(), 128),
            _ => false,
        }
    }
}

fn network(text: &str) -> Option<Network> {
    let (address, bits) = text.split_once('/').map_or((text, None), |(a, b)| (a, Some(b)));
    let address: core::net::IpAddr = address.parse().ok()?;
    let width = if address.is_ipv4() { 32 } else { 128 };
    let bits = bits.map_or(Some(width), |b| b.parse().ok())?;
    (bits <= width).then_some(Network { address, bits })
}

/// `2s`, `1.5s`, `500ms`, `2m`, `12h`, `30d`, `2` (seconds), in milliseconds.
fn time_ms(text: &str) -> Option<u64> {
    const UNITS: [(&str, u64); 5] = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];
    let unit = UNITS.iter().find_map(|(name, ms)| text.strip_suffix(name).map(|digits| (digits, *ms)));
    let (digits, unit) = unit.unwrap_or((text, 1_000));
    let (whole, fraction) = digits.trim().split_once('.').unwrap_or((digits.trim(), ""));
    if fraction.len() > 3 || !fraction.chars().all(|c| c.is_ascii_digit()) {
        return None;
    }
    let thousandths = format!("{fraction:0<3}").parse::<u64>().ok()?;
    whole.parse::<u64>().ok()?.checked_mul(unit)?.checked_add(thousandths * unit / 1_000)
}

fn time_text(ms: u64) -> String {
    match ms {
        _ if ms.is_multiple_of(86_400_000) => format!("{}d", ms / 86_400_000),
        _ if ms.is_multiple_of(3_600_000) => format!("{}h", ms / 3_600_000),
        _ if ms.is_multiple_of(1_000) => format!("{}s", ms / 1_000),
        _ => format!("{ms}ms"),
    }
}

/// `64M`, `1G`, `4096`.
fn bytes(text: &str) -> Option<u64> {
    let (digits, shift) = match text.chars().last()?.to_ascii_uppercase() {
        'K' => (&text[..text.len() - 1], 10),
        'M' => (&text[..text.len() - 1], 20),
        'G' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    digits.trim().parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Edits between two names (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_is_a_value_of_its_option() {
        for option in OPTIONS {
            assert_eq!(check(option.key, Some(option.default)), Ok(()), "{}", option.key);
        }
        let defaults = Options::defaults();
        assert_eq!((defaults.io_timeout_ms, defaults.read_lease_ms, defaults.no_quorum_ms), (2000, 1000, None));
        assert_eq!((defaults.scrub_rate, defaults.scrub_interval_s), (20 << 20, Some(30 * 86_400)));
    }

    #[test]
    fn wrong_values_and_names_are_refused_with_what_would_be_right() {
        for (key, value, says) in [
            ("io-timout", "2s", "the nearest is \"io-timeout\""),
            ("io-timeout", "1ms", "out of range; it must be 200ms..120s"),
            ("io-timeout", "soon", "not of its type; it must be 200ms..120s"),
            ("storage.reserve", "51", "out of range; it must be 0..50"),
            ("auth.allow", "10.0.0.0/33", "\"10.0.0.0/33\" in it, which is no address"),
            ("no-quorum", "never", "it must be wait, 1s..1d"),
            ("scrub.interval", "59m", "out of range; it must be never, 1h..365d"),
            ("scrub.interval", "wait", "not of its type; it must be never, 1h..365d"),
            ("scrub.rate", "fast", "not of its type; it must be 0, 64K..100G"),
            ("repair.rate", "1K", "it must be 0, 64K..100G"),
        ] {
            let why = check(key, Some(value)).expect_err("refused");
            assert!(why.contains(says) && why.contains(if key == "io-timout" { key } else { value }), "{why}");
        }
    }

    #[test]
    fn addresses_are_matched_by_their_network() {
        let options = Options { auth_allow: "10.1.0.0/16, ::1,192.0.2.7".into(), ..Options::defaults() };
        for (address, allowed) in [
            ("10.1.255.3", true),
            ("10.2.0.1", false),
            ("::1", true),
            ("192.0.2.7", true),
            ("192.0.2.8", false),
            ("::ffff:10.1.0.1", true),
        ] {
            assert_eq!(options.allows(address.parse().unwrap()), allowed, "{address}");
        }
    }
}
