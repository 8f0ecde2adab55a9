/** What was dropped: loose files, or the files of one folder. */
export async function droppedFiles(dropped: DataTransfer): Promise<{ files: File[]; folder?: string }> {
  // Entries have to be taken before anything is awaited: the browser empties the drop after that.
  const entries = [...dropped.items].map((item) => item.webkitGetAsEntry());
  const files = [...dropped.files];
  const [entry] = entries;
  if (entries.length !== 1 || !isFolder(entry)) return { files };
  return { files: await filesIn(entry), folder: entry.name };
}

async function filesIn(folder: FileSystemDirectoryEntry): Promise<File[]> {
  const reader = folder.createReader();
  const found: File[] = [];
  for (;;) {
    const entries = await new Promise<FileSystemEntry[]>((resolve, reject) => reader.readEntries(resolve, reject));
    if (entries.length === 0) return found;
    for (const entry of entries) {
      if (isFile(entry)) found.push(await new Promise<File>((resolve, reject) => entry.file(resolve, reject)));
    }
  }
}

function isFolder(entry: FileSystemEntry | null | undefined): entry is FileSystemDirectoryEntry {
  return entry?.isDirectory === true;
}

function isFile(entry: FileSystemEntry): entry is FileSystemFileEntry {
  return entry.isFile;
}
