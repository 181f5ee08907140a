//! GPT-OSS.
