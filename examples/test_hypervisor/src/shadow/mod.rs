//! Shadow paging in a hypervisor: `shadow-mmu` beside `tdp-mmu`.
//!
//! | file | owns |
//! |---|---|
//! | `ram` | guest memory, as walks over the guest's tables and the host see it |
//! | `vm` | a VM whose tables are shadows; the writer's mutex |
//! | `seat` | the way into a guest and out: root, gate, flushes |
//! | `paging` | what a guest's control registers mean |
//! | `vcpu` | a vCPU without nested tables: its faults, control registers, INVLPG |
//! | `emulate` | writes to tables that have a shadow |
//! | `l1` | another hypervisor, as suites play it |
//! | `nested` | a vCPU whose guest is another hypervisor's: its nested tables shadowed |
//! | `town` | where crowds of vCPUs work |
//! | `twin` | the same guest on tables that hardware nests, to compare with |
//!
//! Guest physical addresses are physical addresses: a guest's own tables could be given to the
//! processor as they are, and suites do that to learn what it makes of them.

pub mod emulate;
pub mod l1;
pub mod nested;
pub mod paging;
pub mod ram;
pub mod seat;
pub mod town;
pub mod twin;
pub mod vcpu;
pub mod vm;
