use super::*;

#[test]
fn layouts_and_names_agree_with_the_formats() {
    for ty in TensorType::ALL {
        assert_eq!(TensorType::from_gguf(ty.gguf_id()), Some(ty));
        assert_eq!(TensorType::parse(&ty.name().to_lowercase()), Some(ty));
        assert_eq!(ggml_type_name(ty.gguf_id()), Some(ty.name()));
        assert_eq!(ty.to_string(), ty.name());
        assert_eq!(ty.row_bytes(ty.block_len()), Some(ty.block_bytes()));
        assert_eq!(ty.row_bytes(0), Some(0));
    }
}
