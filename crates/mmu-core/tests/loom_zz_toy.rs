//! toy
#![cfg(loom)]
use std::sync::{Arc, Mutex};
use std::collections::BTreeMap;
use loom::sync::atomic::{AtomicU64, Ordering::*};
#[test]
fn toy() {
    for own in [false, true] {
        let seen = Arc::new(Mutex::new(BTreeMap::new()));
        let s = seen.clone();
        loom::model(move || {
            let x = Arc::new(AtomicU64::new(0));
            let y = x.clone();
            let t = loom::thread::spawn(move || { if own { y.load(Acquire); } y.store(1, Release); });
            let r = x.load(Acquire);
            t.join().unwrap();
            *s.lock().unwrap().entry(r).or_insert(0) += 1;
        });
        println!("own={own} {:?}", seen.lock().unwrap());
    }
    // two threads load then cas
    let seen = Arc::new(Mutex::new(BTreeMap::new()));
    let s = seen.clone();
    loom::model(move || {
        let x = Arc::new(AtomicU64::new(0));
        let y = x.clone();
        let f = |x: &AtomicU64, v: u64| { let o = x.load(Acquire); let r = x.compare_exchange(o, v, AcqRel, Acquire).is_ok(); (o, r) };
        let t = loom::thread::spawn(move || f(&y, 1));
        let r = f(&x, 2);
        let r2 = t.join().unwrap();
        *s.lock().unwrap().entry((r, r2)).or_insert(0) += 1;
    });
    println!("{:#?}", seen.lock().unwrap());
}
