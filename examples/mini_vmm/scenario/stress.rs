//! x
use super::{Builder, Error, Report};
use mmu_core::spte::SpteFormat;
pub fn run<F: SpteFormat>(_: &Builder<'_, F>) -> Result<Report, Error> {
    Err("unfinished".into())
}
