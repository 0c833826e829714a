"""Classes of transformers: those that were tried, and those that no drafter can follow.

What `tests/every_class.py` finds of every class is in docs/results/targets.md. A class that is in
neither table, as a newer one, is tried before it drafts.
"""

from .entries import REFUSED, Entry

_TEST = "test_a_class_that_no_drafter_can_follow_is_refused"

_NO_CACHE = Entry(REFUSED, "it keeps no keys and values of what it has read", test=_TEST)

# classes that write text in a way of their own
REFUSED_CLASSES: dict[str, Entry] = {
    "CpmAntForCausalLM": Entry(
        REFUSED,
        "its forward reads the whole text in every pass, behind prompt tokens of its own",
        test=_TEST,
    ),
    "DoryForCausalLM": Entry(
        REFUSED, "it copies layers of its cache for each of its loops", test=_TEST
    ),
    "GitForCausalLM": Entry(
        REFUSED, "its cache holds an image that no tokens stand for", test=_TEST
    ),
    "OpenAIGPTLMHeadModel": _NO_CACHE,
    "ProphetNetForCausalLM": Entry(
        REFUSED, "with a cache, its forward reads one token a pass", test=_TEST
    ),
    "ReformerModelWithLMHead": Entry(
        REFUSED,
        "its cache holds hashes of its states, which cannot drop rejected tokens",
        test=_TEST,
    ),
    "XLMWithLMHeadModel": Entry(
        REFUSED, "it puts a mask token behind the text of every pass", test=_TEST
    ),
    "XLNetLMHeadModel": _NO_CACHE,
}

# classes that keep their own text in trees or chains with every version, each tried by
# `test_a_class_keeps_its_own_text_or_is_refused_in_a_sentence`
KNOWN_CLASSES = frozenset(
    """
    AXK1ForCausalLM AfmoeForCausalLM Apertus1p5ForConditionalGeneration
    Apertus1p5TextForCausalLM ApertusForCausalLM ArceeForCausalLM AriaForConditionalGeneration
    AriaTextForCausalLM AyaVisionForConditionalGeneration BartForCausalLM BeamForCausalLM
    BertGenerationDecoder BertLMHeadModel BigBirdForCausalLM BigBirdPegasusForCausalLM
    BioGptForCausalLM BitNetForCausalLM BlenderbotForCausalLM BlenderbotSmallForCausalLM
    BloomForCausalLM CTRLLMHeadModel CamembertForCausalLM ChameleonForConditionalGeneration
    CodeGenForCausalLM Cohere2ForCausalLM Cohere2MoeForCausalLM
    Cohere2VisionForConditionalGeneration CohereCompassForCausalLM
    CohereCompassForConditionalGeneration CohereForCausalLM Cosmos3EdgeForConditionalGeneration
    Cosmos3OmniForConditionalGeneration CwmForCausalLM Data2VecTextForCausalLM DbrxForCausalLM
    DeepseekOcr2ForConditionalGeneration DeepseekV2ForCausalLM DeepseekV3ForCausalLM
    DeepseekVLForConditionalGeneration DeepseekVLHybridForConditionalGeneration
    DiffLlamaForCausalLM DogeForCausalLM Dots1ForCausalLM ElectraForCausalLM Emu3ForCausalLM
    Emu3ForConditionalGeneration Ernie4_5ForCausalLM Ernie4_5_MoeForCausalLM
    Ernie4_5_VLMoeForConditionalGeneration ErnieForCausalLM Exaone4ForCausalLM
    Exaone4_5_ForConditionalGeneration ExaoneMoeForCausalLM FalconForCausalLM
    FlexOlmoForCausalLM FlintForCausalLM FuyuForCausalLM GPT2LMHeadModel GPTBigCodeForCausalLM
    GPTJForCausalLM GPTNeoForCausalLM GPTNeoXForCausalLM GPTNeoXJapaneseForCausalLM
    Gemma2ForCausalLM Gemma3ForCausalLM Gemma3ForConditionalGeneration Gemma4ForCausalLM
    Gemma4ForConditionalGeneration Gemma4UnifiedForCausalLM
    Gemma4UnifiedForConditionalGeneration GemmaForCausalLM Glm46VForConditionalGeneration
    Glm4ForCausalLM Glm4MoeForCausalLM Glm4MoeLiteForCausalLM Glm4vForConditionalGeneration
    Glm4vMoeForConditionalGeneration GlmForCausalLM GlmOcrForConditionalGeneration
    GotOcr2ForConditionalGeneration GptOssForCausalLM GraniteDoclingForConditionalGeneration
    GraniteForCausalLM GraniteMoeForCausalLM GraniteMoeSWAForCausalLM
    GraniteMoeSharedForCausalLM GraniteSWAForCausalLM HYV3ForCausalLM HeliumForCausalLM
    HrmTextForCausalLM HunYuanDenseV1ForCausalLM HunYuanMoEV1ForCausalLM
    HunYuanVLForConditionalGeneration HyperCLOVAXForCausalLM
    HyperCLOVAXVisionV2ForConditionalGeneration Idefics2ForConditionalGeneration
    Idefics3ForConditionalGeneration InternVLForConditionalGeneration Jais2ForCausalLM
    JanusForConditionalGeneration JetMoeForCausalLM Kimi_K25ForConditionalGeneration
    Kolibri1ForCausalLM Kosmos2_5ForConditionalGeneration LagunaForCausalLM Lfm2ForCausalLM
    Lfm2MoeForCausalLM Lfm2VlForConditionalGeneration Lfm3ForCausalLM
    Lfm3VlForConditionalGeneration LightOnOcrForConditionalGeneration Llama4ForCausalLM
    LlamaForCausalLM LlavaForConditionalGeneration LlavaNextForConditionalGeneration
    LlavaNextVideoForConditionalGeneration LlavaOnevisionForConditionalGeneration
    LongcatFlashForCausalLM MBartForCausalLM MarianForCausalLM MegatronBertForCausalLM
    MellumForCausalLM MiMoV2FlashForCausalLM MiniCPM3ForCausalLM MiniMaxM2ForCausalLM
    MiniMaxM3VLForCausalLM Ministral3ForCausalLM MinistralForCausalLM
    Mistral3ForConditionalGeneration Mistral4ForCausalLM MistralForCausalLM MixtralForCausalLM
    MllamaForCausalLM MllamaForConditionalGeneration ModernBertDecoderForCausalLM
    Molmo2ForConditionalGeneration MoshiForCausalLM
    MossTranscribeDiarizeForConditionalGeneration MptForCausalLM
    MuseGlimmerForConditionalGeneration MuseSparkForConditionalGeneration MvpForCausalLM
    NanoChatForCausalLM NemotronForCausalLM OPTForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM
    OlmoForCausalLM OlmoeForCausalLM Ovis2ForConditionalGeneration PLBartForCausalLM
    PaddleOCRVLForConditionalGeneration PaliGemmaForConditionalGeneration PegasusForCausalLM
    PersimmonForCausalLM Phi3ForCausalLM Phi4MultimodalForCausalLM PhiForCausalLM
    PhimoeForCausalLM QianfanOCRForConditionalGeneration Qwen2ForCausalLM Qwen2MoeForCausalLM
    Qwen2VLForConditionalGeneration Qwen2_5OmniThinkerForConditionalGeneration
    Qwen2_5_VLForConditionalGeneration Qwen3ForCausalLM Qwen3MoeForCausalLM
    Qwen3OmniMoeThinkerForConditionalGeneration Qwen3VLForConditionalGeneration
    Qwen3VLMoeForConditionalGeneration RemBertForCausalLM RoCBertForCausalLM RobertaForCausalLM
    RobertaPreLayerNormForCausalLM SeedOssForCausalLM SmolLM3ForCausalLM
    SmolVLMForConditionalGeneration SolarOpenForCausalLM StableLmForCausalLM
    Starcoder2ForCausalLM TrOCRForCausalLM VaultGemmaForCausalLM
    VideoLlama3ForConditionalGeneration VideoLlavaForConditionalGeneration
    VipLlavaForConditionalGeneration WhisperForCausalLM XGLMForCausalLM XLMRobertaForCausalLM
    XLMRobertaXLForCausalLM XmodForCausalLM YoutuForCausalLM
    """.split()
)


def own_class(kind: type) -> type:
    """The class of a target: what wraps it at run time, as FSDP does, is none."""
    bases = (base for base in kind.__mro__[:-1] if not base.__module__.startswith("torch."))
    return next(bases, kind)


def refused_name(kind: type) -> str | None:
    """The name of a class or of a base of it that no drafter can follow."""
    names = [base.__name__ for base in kind.__mro__]
    return next((name for name in names if name in REFUSED_CLASSES), None)
