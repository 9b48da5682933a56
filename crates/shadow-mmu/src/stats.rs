//! What a shadow MMU counts for itself, under its writer.

/// Counts since the MMU was made. Plain numbers of the writer's; those of faults and entries stand
/// in [`mmu_core::stats`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShadowStats {
    /// Shadow pages made.
    pub pages_made: u64,
    /// Shadow pages taken apart, whatever for.
    pub pages_zapped: u64,
    /// Shadow pages that reclaim took to make room (KVM's `mmu_recycled`).
    pub pages_recycled: u64,
    /// Pages that reclaim looked at and spared because they were used.
    pub second_chances: u64,
    /// Pages that went out of sync.
    pub unsyncs: u64,
    /// Pages that were synchronised.
    pub syncs: u64,
    /// Writes of the guest to its tables that were seen.
    pub table_writes: u64,
    /// Pages given up because the guest wrote to their tables without using them (KVM row 4.53).
    pub floods: u64,
    /// Entries given up because one frame was mapped too often (KVM row 4.44).
    pub rmap_recycled: u64,
    /// Links given up because one page was linked too often.
    pub links_recycled: u64,
    /// Huge entries that became rows of small ones (KVM row 4.57).
    pub splits: u64,
    /// Entries made around faults (KVM row 4.55).
    pub prefetched: u64,
    /// Steps of the searches for pages out of sync.
    pub sync_steps: u64,
}
