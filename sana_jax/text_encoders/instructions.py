"""The complex human instructions: texts that stand before a prompt, published as part of the models.

The text encoder reads the instruction together with the prompt and its own tokens are then dropped, so it works through
attention alone (SANA, arXiv 2410.10629, section 3.1). Weights were trained with these very words.
"""

from __future__ import annotations

# The default of ``complex_human_instruction`` of diffusers' SanaPipeline (version 0.42.1), word for word.
IMAGE_INSTRUCTION: tuple[str, ...] = (
    "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for image "
    "generation. Evaluate the level of detail in the user prompt:",
    "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial "
    "relationships to create vivid and concrete scenes.",
    "- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.",
    "Here are examples of how to transform or refine prompts:",
    "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping "
    "peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
    "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street "
    "lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass "
    "skyscrapers.",
    "Please generate only the enhanced description for the prompt below and avoid including any additional commentary "
    "or evaluations:",
    "User Prompt: ",
)

# The default of ``chi_prompt`` of diffusers' SanaWMPipeline (version 0.42.1), word for word: other quotation marks.
WORLD_INSTRUCTION: tuple[str, ...] = (IMAGE_INSTRUCTION[0].replace("'", '"'), *IMAGE_INSTRUCTION[1:])

# The default of ``complex_human_instruction`` of diffusers' video pipelines of SANA (version 0.42.1), word for word.
VIDEO_INSTRUCTION: tuple[str, ...] = (
    "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for video "
    "generation. Evaluate the level of detail in the user prompt:",
    "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, motion, and temporal "
    "relationships to create vivid and dynamic scenes.",
    IMAGE_INSTRUCTION[2],
    IMAGE_INSTRUCTION[3],
    "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat slowly settling into a curled position, "
    "peacefully falling asleep on a warm sunny windowsill, with gentle sunlight filtering through surrounding pots of "
    "blooming red flowers.",
    "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street "
    "lamps gradually lighting up, a diverse crowd of people in colorful clothing walking past, and a double-decker bus "
    "smoothly passing by towering glass skyscrapers.",
    *IMAGE_INSTRUCTION[6:],
)
