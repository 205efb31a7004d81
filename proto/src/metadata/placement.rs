//! Which replica set a new file goes to: decided once, at create, by every server alike.

use super::state::{Node, State};
use crate::types::{SetId, VolumeId};

impl State {
    /// The set of the volume that has the fewest files; the first of them. Servers tell their free space to the leader only,
    /// so it cannot be used here, where all must decide alike.
    pub(super) fn place(&self, volume: VolumeId) -> Option<SetId> {
        let sets = &self.volumes.get(&volume)?.sets;
        if let [only] = sets.as_slice() {
            return Some(*only);
        }
        let files = |set: SetId| {
            self.inodes.values().filter(|i| matches!(&i.node, Node::File { set: s, .. } if *s == set)).count()
        };
        sets.iter().copied().min_by_key(|set| files(*set))
    }
}
