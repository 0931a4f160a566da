//! DRAM that a GPU's copies should take straight and cannot: the system refused to page-lock it. Which that is,
//! nothing else: what such copies take is rates.rs's to say, who refuses is the machine's.

use crate::cost::footprint::Buffer;

/// Buffers of DRAM whose page-lock was refused: their copies go through the relay.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Unlocked(pub Vec<Buffer>);

impl Unlocked {
    pub fn has(&self, buffer: Buffer) -> bool {
        self.0.contains(&buffer)
    }

    /// In a few words.
    pub fn describe(&self) -> String {
        let name = |buffer: &Buffer| match buffer {
            Buffer::Weights => "the weights",
            Buffer::Cache => "the cache",
            Buffer::Hidden => "the hidden states",
            Buffer::Ring => "the ring of streamed weights",
            Buffer::CacheStage => "the cache's staging",
            Buffer::HiddenStage => "the hidden states' staging",
            Buffer::Logits => "the logits",
            _ => "small buffers",
        };
        let mut names: Vec<&str> = self.0.iter().map(name).collect();
        names.dedup();
        names.join(", ")
    }
}
