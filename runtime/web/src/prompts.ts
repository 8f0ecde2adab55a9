import { Template } from "@huggingface/jinja";
import { Tokenizer } from "@huggingface/tokenizers";

import { ReftEdgeError } from "./errors";
import { type Folder, readText } from "./folder";
import { isObject, type JsonObject } from "./json";

export interface Message {
  role: string;
  content: string;
}

/** A model's tokenizer and chat template (`reft_edge/prompts.py`). */
export class Prompts {
  private constructor(
    private readonly tokenizer: Tokenizer,
    private readonly template: Template | undefined,
    private readonly specialTokens: Record<string, string>,
  ) {}

  /** Raises ReftEdgeError if the folder has no tokenizer, or one that cannot be read. */
  static async load(folder: Folder): Promise<Prompts> {
    const config = await readJson(folder, "tokenizer_config.json");
    const special: Record<string, string> = {};
    for (const name of ["bos_token", "eos_token", "unk_token", "pad_token"]) {
      const token = config?.[name];
      const text = isObject(token) ? token.content : token;
      if (typeof text === "string") special[name] = text;
    }
    const tokenizer = await readJson(folder, "tokenizer.json");
    if (tokenizer === undefined) throw new ReftEdgeError(`${folder.name} has no tokenizer.json`);
    const source = await templateSource(folder, config);
    try {
      return new Prompts(
        new Tokenizer({ ...tokenizer, truncation: null, padding: null }, config ?? {}),
        source === undefined ? undefined : new Template(source),
        special,
      );
    } catch (error) {
      throw new ReftEdgeError(`cannot read the tokenizer or the chat template: ${String(error)}`);
    }
  }

  get hasTemplate(): boolean {
    return this.template !== undefined;
  }

  /** Tokens of text as it stands, with the special tokens that the tokenizer adds by itself. */
  encodeRaw(text: string): number[] {
    return this.tokenizer.encode(text).ids;
  }

  /** Tokens of a conversation, ending where the assistant's answer begins. Raises ReftEdgeError without a template. */
  encodeChat(messages: Message[]): number[] {
    if (this.template === undefined) {
      throw new ReftEdgeError("the model has no chat template; give prompts as raw text");
    }
    let text: string;
    try {
      text = this.template.render({
        messages,
        add_generation_prompt: true,
        tools: null,
        ...this.specialTokens,
      });
    } catch (error) {
      throw new ReftEdgeError(`the model's chat template failed: ${String(error)}`);
    }
    return this.tokenizer.encode(text, { add_special_tokens: false }).ids;
  }

  /** Text of generated tokens, special tokens left out. */
  decode(ids: number[]): string {
    return this.tokenizer.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false });
  }
}

async function templateSource(folder: Folder, config: JsonObject | undefined): Promise<string | undefined> {
  const file = await folder.read("chat_template.jinja");
  if (file !== undefined) return new TextDecoder().decode(file);
  let template = config?.chat_template;
  if (Array.isArray(template)) {
    template = template.find((entry) => isObject(entry) && entry.name === "default")?.template;
  }
  return typeof template === "string" ? template : undefined;
}

async function readJson(folder: Folder, name: string): Promise<JsonObject | undefined> {
  if ((await folder.read(name)) === undefined) return undefined;
  try {
    const parsed: unknown = JSON.parse(await readText(folder, name));
    if (isObject(parsed)) return parsed;
  } catch (error) {
    if (error instanceof ReftEdgeError) throw error;
  }
  throw new ReftEdgeError(`${folder.name} has a ${name} that is not a JSON object`);
}
