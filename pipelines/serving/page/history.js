/** Earlier requests and their images, in this browser's database; without one, until the page is closed. */

const LONGEST = 60; // requests that are kept

let database = null;

/** Open the database; resolves to the entries in it, oldest first. */
export async function open() {
  try {
    const request = indexedDB.open("unclip", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("entries", { keyPath: "id" });
    database = await settled(request);
    return await settled(entries("readonly").getAll());
  } catch {
    database = null; // private windows may have none
    return [];
  }
}

/** Keep an entry; resolves to the ids of those that had to go for it. */
export async function keep(entry, ids) {
  const gone = ids.slice(0, Math.max(0, ids.length - LONGEST));
  if (database) {
    await settled(entries("readwrite").put(entry)).catch(() => {}); // the disk may be full; the page still has it
    for (const id of gone) await forget(id);
  }
  return gone;
}

export async function forget(id) {
  if (database) await settled(entries("readwrite").delete(id));
}

export async function forgetAll() {
  if (database) await settled(entries("readwrite").clear());
}

const entries = (mode) => database.transaction("entries", mode).objectStore("entries");

const settled = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
