//! GGUF files put together byte by byte, so that they can be wrong.

#[derive(Default)]
pub struct File {
    pairs: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
    data: usize,
}

pub struct Tensor {
    pub name: Vec<u8>,
    pub dims: Vec<u64>,
    pub ty: u32,
    pub offset: u64,
}

impl File {
    pub fn pair(mut self, key: &str, ty: u32, value: Vec<u8>) -> Self {
        self.pairs
            .push([string(key.as_bytes()), ty.to_le_bytes().to_vec(), value].concat());
        self
    }

    pub fn tensor(mut self, t: Tensor) -> Self {
        let mut entry = string(&t.name);
        entry.extend((t.dims.len() as u32).to_le_bytes());
        t.dims.iter().for_each(|n| entry.extend(n.to_le_bytes()));
        entry.extend(t.ty.to_le_bytes());
        entry.extend(t.offset.to_le_bytes());
        self.tensors.push(entry);
        self
    }

    /// Zeros after the head, which is padded to 32 bytes.
    pub fn data(mut self, bytes: usize) -> Self {
        self.data = bytes;
        self
    }

    pub fn bytes_without_padding(&self) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.pairs.len() as u64).to_le_bytes());
        out.extend(self.pairs.concat());
        out.extend(self.tensors.concat());
        out
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = self.bytes_without_padding();
        out.resize(out.len().next_multiple_of(32) + self.data, 0);
        out
    }
}

pub fn string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

pub fn array(element: u32, len: u64, elements: &[u8]) -> Vec<u8> {
    [&element.to_le_bytes()[..], &len.to_le_bytes(), elements].concat()
}
