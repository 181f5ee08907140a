//! Sizes of layers that are worth measuring.

use clap::ValueEnum;

/// `--profile`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(crate) enum ProfileName {
    /// hidden 2880, top-4 of 128 experts
    #[value(alias = "gpt-oss")]
    GptOss,
    /// hidden 7168, top-8 of 256 experts
    #[value(name = "deepseek_v3", alias = "deepseek-v3")]
    DeepSeekV3,
    /// hidden 4096, top-6 of 256 experts
    #[value(name = "deepseek_v4_flash", alias = "deepseek-v4-flash")]
    DeepSeekV4Flash,
    /// hidden 7168, top-6 of 384 experts
    #[value(name = "deepseek_v4_pro", alias = "deepseek-v4-pro")]
    DeepSeekV4Pro,
    /// hidden 3584, top-16 of 896 experts
    #[value(name = "kimi_k3", alias = "kimi-k3")]
    KimiK3,
    /// hidden 8192, top-10 of 512 experts
    #[value(name = "qwen3p8")]
    Qwen3p8,
}

/// The sizes that communication depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Profile {
    pub(crate) hidden_size: usize,
    pub(crate) top_k: usize,
    pub(crate) num_experts: usize,
}

impl ProfileName {
    pub(crate) fn sizes(self) -> Profile {
        let (hidden_size, top_k, num_experts) = match self {
            Self::GptOss => (2880, 4, 128),
            Self::DeepSeekV3 => (7168, 8, 256),
            Self::DeepSeekV4Flash => (4096, 6, 256),
            Self::DeepSeekV4Pro => (7168, 6, 384),
            Self::KimiK3 => (3584, 16, 896),
            Self::Qwen3p8 => (8192, 10, 512),
        };
        Profile { hidden_size, top_k, num_experts }
    }

    /// As the command line has it.
    pub(crate) fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string())
    }
}
