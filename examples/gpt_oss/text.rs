//! Text to token ids and back, as far as the checkpoint allows.

use crate::common::report::BadArguments;
use anyhow::{Result, anyhow};
use candle_moe::models::gpt_oss::Config;
use std::path::Path;
use tiktoken_rs::{CoreBPE, o200k_harmony_singleton};
use tokenizers::Tokenizer;

/// Token ids of the published models.
const HARMONY_VOCABULARY: usize = 201_088;

pub(crate) enum Text {
    /// `tokenizer.json` of the checkpoint.
    Tokenizer(Box<Tokenizer>),
    /// The vocabulary of the published models.
    Harmony(&'static CoreBPE),
    /// No vocabulary, and why.
    IdsOnly(String),
}

impl Text {
    pub(crate) fn for_model(folder: &Path, config: &Config) -> Result<Self> {
        let file = folder.join("tokenizer.json");
        if file.is_file() {
            let tokenizer = Tokenizer::from_file(&file).map_err(|error| anyhow!("{}: {error}", file.display()))?;
            return Ok(Self::Tokenizer(Box::new(tokenizer)));
        }
        if config.vocab_size == HARMONY_VOCABULARY {
            return Ok(Self::Harmony(o200k_harmony_singleton()));
        }
        Ok(Self::IdsOnly(format!(
            "the checkpoint has no tokenizer.json, and its vocabulary of {} is not o200k_harmony's {HARMONY_VOCABULARY}",
            config.vocab_size
        )))
    }

    pub(crate) fn is_available(&self) -> bool {
        !matches!(self, Self::IdsOnly(_))
    }

    pub(crate) fn encode(&self, text: &str) -> Result<Vec<u32>> {
        match self {
            Self::Tokenizer(tokenizer) => match tokenizer.encode(text, false) {
                Ok(encoding) => Ok(encoding.get_ids().to_vec()),
                Err(error) => Err(anyhow!("tokenizer.json: {error}")),
            },
            Self::Harmony(bpe) => Ok(bpe.encode_with_special_tokens(text)),
            Self::IdsOnly(reason) => {
                Err(BadArguments(format!("--prompt needs a vocabulary: {reason}; use --input-ids 1,2,3")).into())
            }
        }
    }

    /// `None` where there is no vocabulary.
    pub(crate) fn decode(&self, ids: &[u32]) -> Result<Option<String>> {
        match self {
            Self::Tokenizer(tokenizer) => match tokenizer.decode(ids, false) {
                Ok(text) => Ok(Some(text)),
                Err(error) => Err(anyhow!("tokenizer.json: {error}")),
            },
            // The last token can end in the middle of a character.
            Self::Harmony(bpe) => {
                Ok(Some(String::from_utf8_lossy(&bpe.decode_bytes(ids).unwrap_or_default()).into_owned()))
            }
            Self::IdsOnly(_) => Ok(None),
        }
    }
}
