//! Weights from files: honest ones, cut ones, lying ones, pickles.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use lathe_engine::files::{
    Header, ModelWeights, SafetensorsFile, StoredDtype, TensorLayout, write_safetensors,
};
use lathe_engine::{Dtype, WeightSource};
use rstest::rstest;
use safetensors::SafeTensors;

fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

fn open(name: &str, bytes: &[u8]) -> Result<SafetensorsFile, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    fs::write(&path, bytes).unwrap();
    SafetensorsFile::open(&path).map_err(|error| error.to_string())
}

const ONE: &str = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;

#[test]
fn a_file_of_ours_is_read_by_the_reference_and_by_us() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let layout =
        |name: &str, dtype, shape: &[usize]| TensorLayout { name: name.into(), dtype, shape: shape.to_vec() };
    let layouts = [
        layout("b", Dtype::F32, &[2, 1]),
        layout("a", Dtype::BF16, &[3]),
        layout("empty", Dtype::F16, &[0, 4]),
    ];
    let data: BTreeMap<&str, Vec<u8>> =
        [("b", vec![1, 2, 3, 4, 5, 6, 7, 8]), ("a", vec![9, 8, 7, 6, 5, 4]), ("empty", vec![])].into();
    let metadata = BTreeMap::from([("lathe".to_owned(), "1".to_owned())]);
    write_safetensors(&path, &layouts, &metadata, |tensor| Ok(data[tensor.name.as_str()].clone())).unwrap();

    let bytes = fs::read(&path).unwrap();
    let reference = SafeTensors::deserialize(&bytes).unwrap();
    let ours = SafetensorsFile::open(&path).unwrap();
    assert_eq!(reference.len(), 3);
    for (name, expected) in data {
        assert_eq!(reference.tensor(name).unwrap().data(), expected, "{name}");
        assert_eq!(ours.get(name).unwrap().bytes, expected, "{name}");
    }
    assert_eq!(ours.get("b").unwrap().shape, [2, 1]);
    assert_eq!(ours.get("a").unwrap().dtype, StoredDtype::BF16);
    assert_eq!(ours.header().metadata["format"], "pt");
    assert_eq!(ours.header().metadata["lathe"], "1");
    assert!(ours.get("c").is_none());
}

#[test]
fn bytes_that_do_not_fit_their_shape_are_never_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let layouts = [TensorLayout { name: "a".into(), dtype: Dtype::F32, shape: vec![2] }];
    let error = write_safetensors(&path, &layouts, &BTreeMap::new(), |_| Ok(vec![0; 7])).unwrap_err();
    assert!(error.to_string().contains("was given 7 bytes"), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[rstest]
#[case::empty(b"".to_vec(), "too short")]
#[case::no_header(file("", 0), "the header is not valid")]
#[case::cut_data(file(ONE, 7), "must rise and lie within the 7 bytes")]
#[case::more_data(file(ONE, 9), "the tensors end at byte 8 of 9")]
#[case::cut_header(file(ONE, 8)[..20].to_vec(), "fit the file of 20 bytes")]
#[case::length_beyond_file([u64::MAX.to_le_bytes().as_slice(), b"{}"].concat(), "fit the file of 10 bytes")]
#[case::not_json(file("{\"a\":", 0), "the header is not valid")]
#[case::not_utf8([2_u64.to_le_bytes().as_slice(), b"\xff\xff"].concat(), "the header is not valid")]
#[case::list(file("[]", 0), "expected an object of tensors")]
#[case::duplicate(file(r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#, 1), "tensor `a` stands twice")]
#[case::duplicate_metadata(file(r#"{"__metadata__":{"x":"1","x":"2"}}"#, 0), "`x` stands twice")]
#[case::metadata_twice(file(r#"{"__metadata__":{},"__metadata__":{}}"#, 0), "stands twice")]
#[case::metadata_number(file(r#"{"__metadata__":{"x":1}}"#, 0), "the header is not valid")]
#[case::overlap(file(r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#, 6), "tensor `b` overlaps")]
#[case::same_bytes(file(r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#, 4), "overlaps")]
#[case::hole(file(r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[6,10]}}"#, 10), "tensor `b` leaves a hole")]
#[case::hole_at_start(file(r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#, 6), "leaves a hole")]
#[case::falling(file(r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[4,0]}}"#, 4), "must rise")]
#[case::small_for_shape(
    file(r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,4]}}"#, 4),
    "does not make 4 bytes"
)]
#[case::shape_wraps(
    file(r#"{"a":{"dtype":"F32","shape":[4611686018427387905,4],"data_offsets":[0,16]}}"#, 16),
    "does not make 16 bytes"
)]
#[case::shape_wraps_to_zero(
    file(r#"{"a":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#, 0),
    "does not make 0 bytes"
)]
#[case::negative(
    file(r#"{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}"#, 1),
    "the header is not valid"
)]
#[case::offsets_overflow(
    file(r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,18446744073709551616]}}"#, 1),
    "the header is not valid"
)]
#[case::dtype(
    file(r#"{"a":{"dtype":"STRING","shape":[1],"data_offsets":[0,1]}}"#, 1),
    "unknown variant `STRING`"
)]
#[case::dimensions(
    file(r#"{"a":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]}}"#, 1),
    "at most 8 dimensions"
)]
#[case::unknown_field(
    file(r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"code":"x"}}"#, 1),
    "unknown field `code`"
)]
#[case::pickle(b"\x80\x02}q\x00(X\x05\x00\x00\x00hello".to_vec(), "is a pickle")]
#[case::pickle_4(b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00\x8c\x01a\x94.".to_vec(), "is a pickle")]
#[case::torch_zip(b"PK\x03\x04\x00\x00\x08\x08\x00\x00archive/data.pkl".to_vec(), "is a pickle")]
fn a_lying_file_is_refused(#[case] bytes: Vec<u8>, #[case] says: &str) {
    let error = open("model.safetensors", &bytes).unwrap_err();
    assert!(error.starts_with("model.safetensors") && error.contains(says), "{error}");
}

#[test]
fn a_header_of_17_mib_is_refused_before_it_is_read() {
    let length = (17_u64 << 20).to_le_bytes();
    let error = Header::parse("x.safetensors", &length, 1 << 40).unwrap_err();
    assert!(error.to_string().contains("at most 16777216 bytes"), "{error}");
}

#[test]
fn a_deeply_nested_header_does_not_exhaust_the_stack() {
    let header = format!("{{\"a\":{}", "[".repeat(1 << 20));
    assert!(open("model.safetensors", &file(&header, 0)).is_err());
}

#[test]
fn every_cut_and_every_changed_byte_of_a_header_is_an_error_or_a_consistent_file() {
    let whole = file(ONE, 8);
    for end in 0..whole.len() {
        assert!(Header::parse("x", &whole[..end], end as u64).is_err(), "cut at {end}");
    }
    for at in 0..whole.len() - 8 {
        for flip in [0x01, 0x10, 0x80] {
            let mut bytes = whole.clone();
            bytes[at] ^= flip;
            if let Ok(header) = Header::parse("x", &bytes, bytes.len() as u64) {
                let total: usize = header.tensors.values().map(|tensor| tensor.range.len()).sum();
                assert_eq!(header.data_start + total, bytes.len());
            }
        }
    }
}

fn write(dir: &Path, name: &str, bytes: &[u8]) {
    fs::write(dir.join(name), bytes).unwrap();
}

fn weights(dir: &Path) -> String {
    ModelWeights::open(dir).unwrap_err().to_string()
}

#[test]
fn shards_are_one_model() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "model-1.safetensors", &file(ONE, 8));
    write(
        dir.path(),
        "model-2.safetensors",
        &file(&ONE.replace("\"a\"", "\"b\"").replace("F32", "F64").replace("[2]", "[1]"), 8),
    );
    let index = r#"{"metadata":{"total_size":16},"weight_map":{"a":"model-1.safetensors","b":"model-2.safetensors"}}"#;
    write(dir.path(), "model.safetensors.index.json", index.as_bytes());
    let model = ModelWeights::open(dir.path()).unwrap();
    assert_eq!(model.names().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(model.tensor("a").unwrap().shape, [2]);
    let error = model.tensor("b").unwrap_err();
    assert!(
        std::error::Error::source(&error)
            .unwrap()
            .to_string()
            .contains("must be F32, F16 or BF16 (found F64)")
    );
    assert_eq!(model.bytes_by_dtype(), BTreeMap::from([("F32".to_owned(), 8), ("F64".to_owned(), 8)]));
}

#[rstest]
#[case(r#"{"weight_map":{"a":"../model-1.safetensors"}}"#, "plain names")]
#[case(r#"{"weight_map":{"a":"/etc/passwd"}}"#, "plain names")]
#[case(r#"{"weight_map":{"a":"sub/model-1.safetensors"}}"#, "plain names")]
#[case(r#"{"weight_map":{"a":"pytorch_model.bin"}}"#, "plain names")]
#[case(r#"{"weight_map":{"a":"model-9.safetensors"}}"#, "cannot open")]
#[case(r#"{"weight_map":{"z":"model-1.safetensors"}}"#, "tensor `z` is missing")]
#[case(r#"{"weight_map":{"a":"model-1.safetensors","a":"model-1.safetensors"}}"#, "`a` stands twice")]
#[case(r#"{"weight_map":3}"#, "is not valid")]
fn a_lying_index_is_refused(#[case] index: &str, #[case] says: &str) {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "model-1.safetensors", &file(ONE, 8));
    write(dir.path(), "model.safetensors.index.json", index.as_bytes());
    let error = weights(dir.path());
    assert!(error.contains(says), "{error}");
}

#[test]
fn a_folder_with_pickles_alone_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    assert!(weights(dir.path()).contains("model.safetensors"));
    write(dir.path(), "pytorch_model.bin", b"anything");
    let error = weights(dir.path());
    assert!(
        error.contains("pytorch_model.bin is a pickle") && error.contains("convert the weights"),
        "{error}"
    );
    write(dir.path(), "model.safetensors", &file(ONE, 8));
    ModelWeights::open(dir.path()).unwrap();
}
