// The trail as others read it: Go's own golang.org/x/mod/sumdb and standard library, and the C2SP specifications.
//
// Reads one JSON question a line and answers one JSON line each: {"error": "..."}, empty where all holds, and what was
// found. The tests compile it against the sources that come with the Go tool chain.
package main

import (
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/mldsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

type question struct {
	Do      string
	Note    []byte
	Vkeys   []string
	Folder  string
	Size    int64
	Root    []byte
	Old     int64
	OldRoot []byte
	Index   int64
	Leaf    []byte
	Proof   [][]byte
}

type answer struct {
	Error string   `json:"error"`
	Names []string `json:"names"`
	Size  int64    `json:"size"`
	Root  []byte   `json:"root"`
	Proof [][]byte `json:"proof"`
}

func main() {
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<26)
	for lines.Scan() {
		var q question
		var a answer
		err := json.Unmarshal(lines.Bytes(), &q)
		if err == nil {
			err = q.answer(&a)
		}
		if err != nil {
			a.Error = err.Error()
		}
		out, _ := json.Marshal(a)
		fmt.Printf("%s\n", out)
	}
}

func (q *question) answer(a *answer) error {
	switch q.Do {
	case "open":
		opened, err := open(q.Note, q.Vkeys)
		if err == nil {
			for _, sig := range opened.Sigs {
				a.Names = append(a.Names, sig.Name)
			}
		}
		return err
	case "published":
		return q.published(a)
	case "numbered":
		return q.numbered(a)
	case "record":
		return tlog.CheckRecord(hashes(q.Proof), q.Size, hash(q.Root), q.Index, hash(q.Leaf))
	case "tree":
		return tlog.CheckTree(hashes(q.Proof), q.Size, hash(q.Root), q.Old, hash(q.OldRoot))
	}
	return errors.New("no such question")
}

func hash(raw []byte) (h tlog.Hash) {
	copy(h[:], raw)
	return h
}

func hashes(raw [][]byte) []tlog.Hash {
	found := make([]tlog.Hash, len(raw))
	for i := range raw {
		found[i] = hash(raw[i])
	}
	return found
}

// Notes.

func open(msg []byte, vkeys []string) (*note.Note, error) {
	var known []note.Verifier
	for _, vkey := range vkeys {
		v, err := newVerifier(vkey)
		if err != nil {
			return nil, err
		}
		known = append(known, v)
	}
	return note.Open(msg, note.VerifierList(known...))
}

// verifier is a key of a type that x/mod does not know: 0x02, 0x04, 0x06.
type verifier struct {
	name   string
	hash   uint32
	verify func(msg, sig []byte) bool
}

func (v *verifier) Name() string                { return v.name }
func (v *verifier) KeyHash() uint32             { return v.hash }
func (v *verifier) Verify(msg, sig []byte) bool { return v.verify(msg, sig) }

func newVerifier(vkey string) (note.Verifier, error) {
	parts := strings.SplitN(vkey, "+", 3)
	if len(parts) != 3 {
		return nil, errors.New("malformed vkey")
	}
	raw, err := base64.StdEncoding.DecodeString(parts[2])
	if err != nil || len(raw) == 0 {
		return nil, errors.New("malformed vkey")
	}
	name, kind, public := parts[0], raw[0], raw[1:]
	if kind == 1 {
		return note.NewVerifier(vkey)
	}
	sum := sha256.Sum256(append([]byte(name+"\n"), raw...))
	v := &verifier{name: name}
	switch kind {
	case 2:
		sum = sha256.Sum256(public)
		err = v.ecdsa(public)
	case 4:
		err = v.ed25519(public)
	case 6:
		err = v.mldsa44(public)
	default:
		err = errors.New("unknown type")
	}
	v.hash = binary.BigEndian.Uint32(sum[:])
	if err == nil && fmt.Sprintf("%08x", v.hash) != parts[1] {
		err = errors.New("wrong key hash")
	}
	return v, err
}

func (v *verifier) ecdsa(public []byte) error {
	// DER SubjectPublicKeyInfo of P-256: always these 26 bytes, then the point. (crypto/x509 takes long to compile.)
	head := "\x30\x59\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x03\x42\x00"
	if !bytes.HasPrefix(public, []byte(head)) {
		return errors.New("no P-256 key")
	}
	p256, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), public[len(head):])
	if err != nil {
		return err
	}
	v.verify = func(msg, sig []byte) bool {
		digest := sha256.Sum256(msg)
		return ecdsa.VerifyASN1(p256, digest[:], sig)
	}
	return nil
}

func (v *verifier) ed25519(public []byte) error {
	if len(public) != ed25519.PublicKeySize {
		return errors.New("wrong key size")
	}
	v.verify = func(msg, sig []byte) bool {
		if len(sig) != 8+ed25519.SignatureSize {
			return false
		}
		when := binary.BigEndian.Uint64(sig)
		signed := fmt.Sprintf("cosignature/v1\ntime %d\n%s", when, msg)
		return when != 0 && when < 1<<63 && ed25519.Verify(public, []byte(signed), sig[8:])
	}
	return nil
}

func (v *verifier) mldsa44(public []byte) error {
	key, err := mldsa.NewPublicKey(mldsa.MLDSA44(), public)
	if err != nil {
		return err
	}
	v.verify = func(msg, sig []byte) bool {
		origin, size, root, err := checkpoint(string(msg))
		if err != nil || len(sig) != 8+mldsa.MLDSA44().SignatureSize() || sig[0] >= 0x80 {
			return false
		}
		signed := append([]byte("subtree/v1\n\x00"), byte(len(v.name)))
		signed = append(signed, v.name...)
		signed = append(signed, sig[:8]...)
		signed = append(append(signed, byte(len(origin))), origin...)
		signed = binary.BigEndian.AppendUint64(signed, 0)
		signed = binary.BigEndian.AppendUint64(signed, uint64(size))
		signed = append(signed, root[:]...)
		return mldsa.Verify(key, signed, sig[8:], nil) == nil
	}
	return nil
}

func checkpoint(text string) (origin string, size int64, root tlog.Hash, err error) {
	lines := strings.SplitN(text, "\n", 4)
	if len(lines) < 4 {
		return "", 0, root, errors.New("no checkpoint")
	}
	if size, err = strconv.ParseInt(lines[1], 10, 64); err == nil {
		root, err = tlog.ParseHash(lines[2])
	}
	return lines[0], size, root, err
}

// Trees.

type memory []tlog.Hash

func (m memory) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	found := make([]tlog.Hash, len(indexes))
	for i, index := range indexes {
		if index >= int64(len(m)) {
			return nil, errors.New("no such hash")
		}
		found[i] = m[index]
	}
	return found, nil
}

func (m *memory) add(index int64, data []byte) error {
	more, err := tlog.StoredHashes(index, data, *m)
	*m = append(*m, more...)
	return err
}

// tiles reads a folder in the layout of tlog-tiles; x/mod's own paths have the height before the level.
type tiles struct{ folder string }

func (t tiles) Height() int                         { return 8 }
func (t tiles) SaveTiles(_ []tlog.Tile, _ [][]byte) {}

func (t tiles) ReadTiles(wanted []tlog.Tile) ([][]byte, error) {
	var found [][]byte
	for _, tile := range wanted {
		data, err := os.ReadFile(filepath.Join(t.folder, strings.Replace(tile.Path(), "tile/8/", "tile/", 1)))
		if err != nil {
			return nil, err
		}
		if len(data) != tile.W*tlog.HashSize {
			return nil, fmt.Errorf("%s has %d bytes", tile.Path(), len(data))
		}
		found = append(found, data)
	}
	return found, nil
}

// published verifies a folder: the note's signature, every tile by the root, and every entry by its tile.
func (q *question) published(a *answer) error {
	msg, err := os.ReadFile(filepath.Join(q.Folder, "checkpoint"))
	if err != nil {
		return err
	}
	opened, err := open(msg, q.Vkeys)
	if err != nil {
		return err
	}
	_, size, root, err := checkpoint(opened.Text)
	if err != nil {
		return err
	}
	a.Size, a.Root = size, root[:]
	var stored memory
	reader := tlog.TileHashReader(tlog.Tree{N: size, Hash: root}, tiles{q.Folder})
	for first := int64(0); first < size; first += 256 {
		width := int(min(256, size-first))
		entries, err := bundle(q.Folder, first/256, width)
		if err != nil {
			return err
		}
		var indexes []int64
		for i, entry := range entries {
			if err := stored.add(first+int64(i), entry); err != nil {
				return err
			}
			indexes = append(indexes, tlog.StoredHashIndex(0, first+int64(i)))
		}
		leaves, err := reader.ReadHashes(indexes)
		if err != nil {
			return err
		}
		for i, entry := range entries {
			if tlog.RecordHash(entry) != leaves[i] {
				return fmt.Errorf("entry %d is not what its tile says", first+int64(i))
			}
		}
	}
	return q.proofs(a, stored, size, root)
}

func bundle(folder string, number int64, width int) ([][]byte, error) {
	tile := tlog.Tile{H: 8, L: -1, N: number, W: width}
	path := strings.Replace(tile.Path(), "tile/8/data/", "tile/entries/", 1)
	data, err := os.ReadFile(filepath.Join(folder, path))
	if err != nil {
		return nil, err
	}
	var entries [][]byte
	for len(data) >= 2 {
		length := int(binary.BigEndian.Uint16(data))
		if len(data) < 2+length {
			return nil, errors.New("cut entry")
		}
		entries = append(entries, data[2:2+length])
		data = data[2+length:]
	}
	if len(data) != 0 || len(entries) != width {
		return nil, fmt.Errorf("%s holds %d entries", path, len(entries))
	}
	return entries, nil
}

// numbered builds the tree of the entries entry-0, entry-1 ... and compares its root.
func (q *question) numbered(a *answer) error {
	var stored memory
	for i := int64(0); i < q.Size; i++ {
		if err := stored.add(i, fmt.Appendf(nil, "entry-%d", i)); err != nil {
			return err
		}
	}
	return q.proofs(a, stored, q.Size, hash(q.Root))
}

// proofs compares the root with Go's own over the same leaves, and gives Go's proof of inclusion or of consistency.
func (q *question) proofs(a *answer, stored memory, size int64, root tlog.Hash) error {
	own, err := tlog.TreeHash(size, stored)
	if err != nil {
		return err
	}
	if !bytes.Equal(own[:], root[:]) {
		return errors.New("the root is not that of the entries")
	}
	var proof []tlog.Hash
	if q.Old > 0 {
		proof, err = tlog.ProveTree(size, q.Old, stored)
	} else {
		proof, err = tlog.ProveRecord(size, q.Index, stored)
	}
	for _, h := range proof {
		a.Proof = append(a.Proof, h[:])
	}
	return err
}
