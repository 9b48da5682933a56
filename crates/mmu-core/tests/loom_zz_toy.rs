//! toy
#![cfg(loom)]
use std::sync::{Arc, Mutex};
use mmu_core::sync::AtomicU64;
use loom::sync::atomic::Ordering::*;
#[test]
fn toy() {
    loom::model(move || {
        let log = Arc::new(Mutex::new(Vec::new()));
        let x = Arc::new(AtomicU64::new(0));
        let y = x.clone();
        let f = |n: &str, x: &AtomicU64, v: u64, log: &Mutex<Vec<String>>| {
            let o = x.load(Acquire); log.lock().unwrap().push(format!("{n} load {o}"));
            let r = x.compare_exchange(o, v, AcqRel, Acquire).is_ok();  log.lock().unwrap().push(format!("{n} cas {r}"));
            };
        let l = log.clone();
        let t = loom::thread::spawn(move || f("T", &y, 1, &l));
        f("M", &x, 2, &log);
        t.join().unwrap();
        println!("{:?}", log.lock().unwrap());
    });
}
