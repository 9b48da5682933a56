//! Which rows there are: unit, target, the figure of KVM's own code (better of two versions), and
//! who measures them. Definitions and reasons: `docs/PERFORMANCE.md`.

use crate::harness::Bench;
use crate::{age, dirty, fault, guest, limits, pair, shadow, stall, tib, walk, zap};

/// One figure.
pub struct Row {
    pub name: &'static str,
    pub unit: &'static str,
    pub target: Option<f64>,
    pub kvm: Option<f64>,
}

/// Measures those of its rows that are wanted.
pub type Measure = fn(&mut Bench, &dyn Fn(&str) -> bool);

/// Rows that are measured together, or one by one with the same preparation.
pub struct Family {
    pub rows: &'static [Row],
    pub run: Measure,
}

const fn new(name: &'static str, unit: &'static str) -> Row {
    Row { name, unit, target: None, kvm: None }
}

impl Row {
    const fn target(self, target: f64) -> Self {
        Self { target: Some(target), ..self }
    }

    const fn kvm(self, kvm: f64) -> Self {
        Self { kvm: Some(kvm), ..self }
    }
}

const NS: &str = "ns/page";

/// Everything that can be measured.
pub const FAMILIES: &[Family] = &[
    Family {
        rows: &[
            new("limit_stream_read", "ns/entry"),
            new("limit_lock_and", "ns/entry"),
            new("limit_lock_cmpxchg", "ns/entry"),
        ],
        run: limits::stream,
    },
    Family { rows: &[new("limit_walk_rand", NS)], run: limits::walk },
    Family { rows: &[new("limit_zero_4k", "ns")], run: limits::zero },
    Family {
        rows: &[
            new("fault_4k_seq", NS).target(15.0).kvm(54.6),
            new("fault_4k_rand", NS).target(60.0).kvm(163.0),
        ],
        run: fault::small,
    },
    Family { rows: &[new("line_transfer_ns", "ns")], run: pair::line },
    Family {
        // KVM where a line is near. The target is a ratio, 1.9 times one thread: see the note.
        rows: &[
            new("fault_2t_halves", NS).target(8.0).kvm(45.0),
            new("fault_2t_blocks", NS).target(8.0).kvm(46.0),
        ],
        run: pair::faults,
    },
    Family {
        rows: &[
            new("fault_2m", NS).target(14.0).kvm(56.2),
            new("fault_1g", NS).target(14.0).kvm(53.1),
        ],
        run: fault::huge,
    },
    Family { rows: &[new("spurious", NS).target(10.0).kvm(52.9)], run: fault::spurious },
    Family {
        rows: &[
            new("fast_fault", NS).target(10.0).kvm(26.7),
            new("fast_fault_tracked", NS).target(10.0),
        ],
        run: fault::fast,
    },
    Family {
        rows: &[
            new("wrprot", NS).target(6.0).kvm(8.7),
            new("wrprot_idle", NS).target(0.4).kvm(2.2),
            new("clear_dirty", NS).target(6.0).kvm(8.7),
            new("clear_dirty_idle", NS).target(0.4).kvm(2.5),
        ],
        run: dirty::protect,
    },
    Family {
        rows: &[
            new("clear_log64", NS).target(6.0).kvm(3.8),
            new("fast_fault_log", NS).target(12.0).kvm(26.7),
        ],
        run: dirty::log,
    },
    Family {
        rows: &[
            new("split", "ns/table").target(200.0).kvm(1269.0),
            new("collapse", "ns/table").target(300.0).kvm(6462.0),
        ],
        run: dirty::sizes,
    },
    Family { rows: &[new("unmap_range", NS).target(6.0).kvm(10.3)], run: zap::range },
    Family {
        rows: &[
            new("zap_all_visible", "ns").target(300.0).kvm(1943.0),
            new("zap_all_total", NS).target(0.8).kvm(21.2),
            new("zap_all_visible_416", "ns").target(300.0),
        ],
        run: zap::all,
    },
    Family {
        rows: &[
            new("age_0", NS).target(0.3).kvm(2.13),
            new("age_1", NS).target(0.4).kvm(2.26),
            new("age_50", NS).target(4.2).kvm(6.7),
            new("age_100", NS).target(5.6).kvm(3.8),
            new("age_bitmap", NS).target(0.5).kvm(25.6),
        ],
        run: age::shares,
    },
    Family {
        rows: &[
            new("age_1tib_full", "ms").target(120.0).kvm(648.0),
            new("age_1tib_hot1", "ms").target(4.0).kvm(690.0),
            new("age_1tib_idle", "ms").target(0.4).kvm(648.0),
        ],
        run: tib::rows,
    },
    Family { rows: &[new("age_while_faulting", NS)], run: stall::aging },
    Family {
        rows: &[
            new("unmap_stall_p9999", "ns").kvm(16_000.0),
            new("unmap_stall_max", "ns").kvm(1_420_000.0),
        ],
        run: stall::unmap,
    },
    Family {
        rows: &[
            new("walk_seq", NS).target(3.0).kvm(13.9),
            new("walk_rand", NS).kvm(52.0),
            new("walk_batch16", NS).target(6.0).kvm(58.0),
            new("walk_one", NS).kvm(13.9),
        ],
        run: walk::rows,
    },
    Family { rows: &[new("guest_walk", NS), new("guest_walk_2d", NS)], run: guest::rows },
    Family {
        rows: &[
            new("shadow_fault", NS).target(150.0).kvm(357.0),
            new("shadow_fault_nested", NS),
            new("shadow_age", NS).target(5.5).kvm(6.1),
            new("shadow_age_idle", NS).target(0.6).kvm(2.6),
            new("cr3_switch", "ns"),
        ],
        run: shadow::rows,
    },
    Family {
        rows: &[
            new("rmap_add_remove", NS),
            new("rmap_bytes_per_mapping_1", "bytes").target(8.0).kvm(8.0),
            new("rmap_bytes_per_mapping_2", "bytes").target(8.0).kvm(68.0),
            new("rmap_bytes_per_mapping_9", "bytes").target(8.0).kvm(15.1),
        ],
        run: shadow::rmaps,
    },
    Family {
        rows: &[
            new("table_bytes_per_gib", "MiB").target(2.021).kvm(2.095),
            new("meta_bytes_per_table", "bytes").target(32.0).kvm(184.0),
        ],
        run: fault::space,
    },
];

/// Rows whose operation is not built.
pub const NOT_YET: &[&str] = &["populate_bulk", "shadow_fault_prefetch"];

/// Names of the rows that can be measured.
pub fn names() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().flat_map(|family| family.rows).map(|row| row.name)
}

/// The row of that name.
pub fn row(name: &str) -> &'static Row {
    let mut rows = FAMILIES.iter().flat_map(|family| family.rows);
    rows.find(|row| row.name == name).expect("a measured row is in the catalogue")
}
