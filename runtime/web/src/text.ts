import type { Prompts } from "./prompts";

/** Turns tokens into text pieces of whole characters. */
export class TextStream {
  private readonly tokens: number[] = [];
  private shown = 0;

  constructor(private readonly prompts: Prompts) {}

  /** The text that this token completes; "" while a character is unfinished. */
  push(token: number): string {
    this.tokens.push(token);
    const text = this.prompts.decode(this.tokens);
    return text.endsWith("\ufffd") ? "" : this.give(text);
  }

  /** What was held back, at the end; a character that was never completed is U+FFFD. */
  flush(): string {
    return this.give(this.prompts.decode(this.tokens));
  }

  private give(text: string): string {
    const piece = text.slice(this.shown);
    this.shown = text.length;
    return piece;
  }
}
