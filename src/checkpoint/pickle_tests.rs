//! Pickles written by hand: valid, damaged and hostile.
//! Nothing but tests of pickle.rs lives here.

use super::*;

/// `{"w": _rebuild_tensor_v2(storage 0 of 6 halves, offset, (2, 3), strides)}`.
fn one_tensor(call: &str, strides: &[u8]) -> Vec<u8> {
    let mut p = b"\x80\x02}X\x01\0\0\0wc".to_vec();
    p.extend(call.as_bytes());
    p.extend(b"\n((X\x07\0\0\0storagectorch\nHalfStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x06tQ");
    p.extend(b"K\0K\x02K\x03\x86");
    p.extend(strides);
    p.extend(b"\x89ccollections\nOrderedDict\n)RtRs.");
    p
}

#[test]
fn a_tensor_becomes_a_view() {
    let p = one_tensor("torch._utils\n_rebuild_tensor_v2", b"K\x01K\x02\x86");
    let list = state_dict(&p).expect("valid");
    let (name, view) = &list[0];
    assert_eq!(
        (name.as_str(), view.key.as_str(), view.storage_bytes),
        ("w", "0", 12)
    );
    assert_eq!(
        (&view.shape[..], &view.strides[..]),
        (&[2, 3][..], &[1, 2][..])
    );
    assert_eq!(view.element, Element::Float(Dtype::F16));
}

#[test]
fn anything_that_could_run_is_refused_by_name() {
    let refusal = |p: &[u8]| match state_dict(p) {
        Err(Fault::Refused(why)) => why,
        other => panic!("{other:?}"),
    };
    let p = one_tensor("os\nsystem", b"K\x01K\x02\x86");
    assert!(refusal(&p).contains("os.system"));
    assert!(refusal(b"\x80\x02cbuiltins\neval\n.").contains("builtins.eval"));
    assert!(refusal(b"\x80\x04\x8c\x05posix\x8c\x06system\x93.").contains("posix.system"));
    assert!(refusal(b"ctorch\nload\n.").contains("torch.load"));
    assert!(refusal(b"i").contains("0x69"));
    assert!(refusal(b"}.").contains("no tensors"));
    assert!(refusal(b"N.").contains("no state dict"));
}

#[test]
fn damage_is_an_error() {
    let whole = one_tensor("torch._utils\n_rebuild_tensor_v2", b"K\x01K\x02\x86");
    for length in 0..whole.len() {
        assert!(state_dict(&whole[..length]).is_err(), "{length}");
    }
    let negative = one_tensor(
        "torch._utils\n_rebuild_tensor_v2",
        b"J\xff\xff\xff\xffK\x02\x86",
    );
    assert!(matches!(state_dict(&negative), Err(Fault::Damaged(_))));
    for bad in [
        &b"h\0."[..],
        b"0",
        b"t.",
        b"R.",
        b"(R",
        b"s.",
        b"a.",
        b"Q",
        b"X\xff\xff\xff\xff",
    ] {
        assert!(state_dict(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn deep_nesting_and_endless_marks_stay_flat() {
    let mut deep = b")".to_vec();
    deep.extend(vec![0x85; 1 << 20]);
    assert!(state_dict(&deep).is_err());
    assert!(state_dict(&vec![b'('; 1 << 22]).is_err());
}
