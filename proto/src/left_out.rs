//! Which rules are left out, to prove that the simulator notices. Only tests can leave any out: without the feature
//! `leave-out`, which no program is built with, every rule is kept and the questions here cost nothing.
//!
//! A rule is asked for at the one place that keeps it. Some are kept by what surrounds the machines (the order in which a
//! brick makes things durable, say): for those the simulator asks in its own place.

macro_rules! rules {
    ($($name:ident, $rule:literal, $found:literal, $text:literal;)*) => {
        /// A rule, or a part of one, by what is left out.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
        pub enum Rule {
            $(#[doc = $text] $name,)*
        }
        impl Rule {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)*];
            /// The name of the rule.
            #[must_use]
            pub const fn rule(self) -> &'static str {
                match self { $(Self::$name => $rule,)* }
            }
            /// Under which number the model of the protocol found that it is needed, if it did.
            #[must_use]
            pub const fn found(self) -> &'static str {
                match self { $(Self::$name => $found,)* }
            }
            /// What is left out.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

rules! {
    F1Older, "F1", "", "requests with older numbers are taken";
    F1Newer, "F1", "", "requests with newer numbers are not waited for";
    F1Session, "F1", "", "requests of another session are taken";
    F2Drain, "F2", "F2", "what was accepted under older numbers may still run";
    F2Durable, "F2", "F2", "the applied log is forgotten by a power cut";
    F3Applied, "F3", "F3", "what was applied already is applied again";
    F3Running, "F3", "", "the same request may run twice at once";
    F3Pulls, "F3", "F-13", "pulls and copies run again";
    F3Connection, "F3", "", "an older connection of a client is still served";
    W1Recall, "W1", "", "a holder that is asked for its lease keeps it";
    W1InFlight, "W1", "", "a holder releases while mutations are in flight";
    W1Unsettled, "W1", "A-5", "a holder releases before it has finished `[W2]`";
    W1Lapsed, "W1", "", "what a lapsed session left is not recovered";
    W2Fence, "W2", "W2", "the fences are not waited for";
    W2Recover, "W2", "W2", "nothing is recovered";
    W2SyncingLists, "W2", "F-3", "only the lists of InSync bricks are asked for";
    W2Targets, "W2", "A-1", "copies go to InSync bricks only";
    W2Highest, "W2", "", "the lowest (e, seq) is copied, not the highest";
    W2Bookkeeping, "W2", "F-4", "what is recovered is booked by nobody";
    W2BookkeepingSource, "W2", "F-4", "what is recovered is not booked by its source";
    W2CopyInDoubt, "W2", "A-3", "a copy is not in doubt at its target";
    W2Restart, "W2", "A-2", "lists gathered under an older n still count";
    W3OneAnswer, "W3", "", "one answer is enough";
    W3Syncing, "W3", "W3", "Syncing bricks are not waited for";
    W3Two, "W3", "", "a single brick is enough";
    W3Busy, "W3", "", "mutations that overlap are in flight together";
    W4Again, "W4", "W4", "what has no acknowledgement yet is not sent again under the new n";
    W5Missed, "W5", "W5", "nothing is recorded as missed";
    W5Syncing, "W5", "F-5", "Syncing bricks record nothing as missed";
    W5Durable, "W5", "", "what is missed is not durable before the answer";
    W6Fence, "W6", "A-4", "Fence and copies prune";
    W6Stable, "W6", "F-2", "stable is what every InSync brick has";
    W7Intents, "W7", "W7", "no intents are recorded";
    W7Durable, "W7", "", "intents are not durable before the data";
    W7Pulls, "W7", "", "repair writes have no intents";
    W7Inherited, "W7", "A-6", "intents found at start are cleared";
    W7Doubt, "W7", "", "intents of what is in doubt are cleared";
    W7Flushed, "W7", "", "intents are cleared without a flush";
    W8Syncing, "W8", "F-10", "Syncing bricks are not flushed";
    W8OneAnswer, "W8", "", "one flushed brick is enough";
    W8Failed, "W8, E4", "", "a brick whose flush failed goes on";
    W8Again, "W8, E6", "", "a brick whose disk refused something trusts, at its next start, what it can read";
    R1Index, "R1", "F-1", "the log index in the answer to a heartbeat";
    R1Lease, "R1", "", "reads are served without a read lease";
    R1Sent, "R1", "", "the read lease counts from the answer, not from the heartbeat";
    R1Quorum, "R1", "", "a leader answers heartbeats though no quorum confirms that it leads";
    R2, "R2", "", "Syncing bricks serve reads";
    R3, "R3", "", "a read does not wait for a mutation in flight from the same mount";
    R4, "R4", "", "a read is asked of one brick only";
    R5Read, "R5", "", "what does not verify is answered";
    R5Repair, "R5", "", "what is corrupt is not repaired";
    R5Source, "R5", "", "a pull takes what does not verify at its source";
    R5Target, "R5", "", "a pull leaves what is corrupt at its target and has the right checksum";
    E1Lapsed, "E1", "E1", "a brick is put out that may still serve reads";
    E1Agreed, "E1", "F-11", "an agreement ends with any later configuration that has the brick InSync, and counts under any";
    E1Elected, "E1", "", "a new leader does not count from its election";
    E1Answered, "E1", "", "a brick is answered though it is about to be put out";
    E1Replaced, "E1", "", "a brick is replaced that may still serve reads";
    E2Replaced, "E2", "", "a brick is replaced though none that is InSync stays";
    E2Last, "E2", "E2", "the last InSync brick is put out";
    E2Restarted, "E2", "F-15", "a brick that has restarted counts as one that stays";
    E3, "E3", "", "I/O that waits for a brick ends in an error";
    E5Awaited, "E5", "E5", "a brick serves before its registration is applied";
    E5Number, "E5, S4", "F-7", "the registration of a Syncing brick makes no new n";
    E5Late, "E5", "", "an earlier start that is heard late is registered again";
    E5Copy, "E5", "", "a disk that is an older copy of itself is taken for the brick";
    E5Clean, "E5", "A-7", "a clean stop clears the intents of what is in doubt";
    E6Intents, "E6", "F-12", "the source does not enter its intents as missed";
    E6Boot, "E6", "F-14", "any brick becomes the source";
    E6Wait, "E6", "A-8", "a cold start does not wait for others that were InSync";
    E7Source, "E7", "F-9", "that some brick kept its boot id counts as no loss";
    E7Told, "E7", "", "a client that lost writes is not told";
    E8, "E8", "", "a brick that was put out returns at once";
    S1Full, "S1", "", "a brick that is new in its place gets back what intents and lists name only";
    S1Late, "S1", "", "a pull that was ordered before the plan was made takes something off it";
    S1Own, "S1", "S1", "the brick's own intents are not repaired";
    S1Source, "S1", "S1", "the source's intents are not repaired";
    S2Busy, "S2", "", "repair does not hold the range";
    S2Clear, "S2", "", "a region is cleared before it was pulled";
    S3, "S3", "", "checksums are not made anew after an unclean stop";
    S3Vouched, "S3", "", "the source of a cold start does not look whether others have what its checksums are of";
    S4Reports, "S4", "S4", "a brick is promoted though others list something as missed by it";
    S4Number, "S4", "F-8", "reports of an older n count";
    S4Drained, "S4, F2", "", "reports are made while older work runs";
    S4Flush, "S4", "S4", "a brick reports without a flush after its last repair";
    S4TakeOver, "S4", "F-6", "a promoted brick does not take over what others miss";
    S5, "S5", "", "regions are repaired without a permit";
}

#[cfg(not(feature = "leave-out"))]
/// Is this rule left out?
#[must_use]
pub const fn left_out(_: Rule) -> bool {
    false
}

#[cfg(feature = "leave-out")]
mod chosen {
    use super::Rule;
    use std::cell::Cell;

    std::thread_local! {
        static LEFT_OUT: Cell<Option<Rule>> = const { Cell::new(None) };
    }
    /// Is this rule left out?
    #[must_use]
    pub fn left_out(rule: Rule) -> bool {
        LEFT_OUT.get() == Some(rule)
    }
    /// Leaves a rule out, in this thread, until it is told otherwise.
    pub fn leave_out(rule: Option<Rule>) {
        LEFT_OUT.set(rule);
    }
}

#[cfg(feature = "leave-out")]
pub use chosen::{leave_out, left_out};
