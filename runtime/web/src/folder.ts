import { ReftEdgeError } from "./errors";

/** An exported folder, wherever its files are. */
export interface Folder {
  /** For messages. */
  name: string;
  /** A file's content, or undefined if there is no such file. Raises ReftEdgeError if it cannot be read. */
  read(file: string, progress?: Progress): Promise<Uint8Array | undefined>;
}

/** Called with bytes read so far and in all; the latter is 0 where it is not known. */
export type Progress = (loaded: number, total: number) => void;

/** A folder on a web server, by the URL of the folder itself. */
export function folderAt(url: string | URL): Folder {
  const base = new URL(url);
  if (!base.pathname.endsWith("/")) base.pathname += "/";
  return {
    name: base.href,
    async read(file, progress) {
      checkName(file);
      let response: Response;
      try {
        response = await fetch(new URL(encodeURIComponent(file), base));
        if (response.status === 404) return undefined;
        if (!response.ok) throw new ReftEdgeError(`${base.href}${file} answered ${response.status}`);
        return await readBody(response, progress);
      } catch (error) {
        if (error instanceof ReftEdgeError) throw error;
        throw new ReftEdgeError(`cannot read ${base.href}${file}: ${String(error)}`);
      }
    },
  };
}

/** A folder that was picked or dropped, as its files; those in folders inside it are left out. */
export function folderOf(name: string, files: Iterable<File>): Folder {
  const byName = new Map<string, File>();
  for (const file of files) {
    if (file.webkitRelativePath.split("/").length <= 2) byName.set(file.name, file);
  }
  return {
    name,
    async read(file, progress) {
      const found = byName.get(file);
      if (found === undefined) return undefined;
      try {
        const content = new Uint8Array(await found.arrayBuffer());
        progress?.(content.byteLength, content.byteLength);
        return content;
      } catch (error) {
        throw new ReftEdgeError(`cannot read ${name}/${file}: ${String(error)}`);
      }
    },
  };
}

/** A file's content. Raises ReftEdgeError if there is no such file. */
export async function readFile(folder: Folder, file: string, progress?: Progress): Promise<Uint8Array> {
  checkName(file);
  const content = await folder.read(file, progress);
  if (content === undefined) throw new ReftEdgeError(`${folder.name} has no ${file}`);
  return content;
}

/** The same as text. */
export async function readText(folder: Folder, file: string): Promise<string> {
  return new TextDecoder().decode(await readFile(folder, file));
}

function checkName(file: string): void {
  if (file === "" || file === ".." || file === "." || /[/\\\0]/.test(file)) {
    throw new ReftEdgeError(`the folder names a file outside itself: '${file}'`);
  }
}

async function readBody(response: Response, progress?: Progress): Promise<Uint8Array> {
  if (progress === undefined || response.body === null) return new Uint8Array(await response.arrayBuffer());
  const total = Number(response.headers.get("content-length") ?? 0);
  const encoded = response.headers.has("content-encoding");
  const chunks: Uint8Array[] = [];
  let loaded = 0;
  const reader = response.body.getReader();
  for (let next = await reader.read(); !next.done; next = await reader.read()) {
    chunks.push(next.value);
    loaded += next.value.byteLength;
    progress(loaded, encoded ? 0 : total);
  }
  const content = new Uint8Array(loaded);
  let at = 0;
  for (const chunk of chunks) {
    content.set(chunk, at);
    at += chunk.byteLength;
  }
  return content;
}
