export { type Adapter, type AdapterConfig, readAdapter } from "./adapter";
export { ReftEdgeError } from "./errors";
export { type Folder, folderAt, folderOf, type Progress } from "./folder";
export type { Manifest } from "./manifest";
export { type Finished, type Generation, type OpenOptions, SteeredModel, type StreamOptions } from "./model";
export type { Message } from "./prompts";
export type { Runtime } from "./session";
