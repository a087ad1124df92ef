package catalog

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
)

// listMilvus asks for the endpoint's own database: the gateway has seen that the client asks for no other.
func listMilvus(r *http.Request, q *question) (any, error) {
	body, err := json.Marshal(map[string]string{"dbName": q.endpoint.Database.Name})
	if err != nil {
		return nil, err
	}
	var told struct {
		Code int
		Data array
	}
	err = q.store.read(r.Context(), call{method: http.MethodPost, at: "/v2/vectordb/collections/list", body: body, lists: true}, &told)
	if err != nil {
		return nil, err
	}
	if told.Code != 0 && told.Code != http.StatusOK { // as it was before 2.5
		return nil, fmt.Errorf("list collections: code %d", told.Code)
	}
	var names []string
	for _, raw := range told.Data {
		var name string
		if err := json.Unmarshal(raw, &name); err != nil {
			return nil, fmt.Errorf("read list of collections: %w", err)
		}
		names = append(names, name)
	}
	return struct {
		Code int      `json:"code"`
		Data []string `json:"data"`
	}{0, q.visibleNames(names, stored)}, nil
}

// The fields of milvus.proto.milvus.ShowCollectionsRequest, of ShowCollectionsResponse, and of common.Status.
const (
	showDatabase protowire.Number = 2
	showType     protowire.Number = 4 // all, or what is loaded
	showNames    protowire.Number = 5 // of these, if there are any

	shownStatus protowire.Number = 1
	shownNames  protowire.Number = 2
	shownFirst  protowire.Number = 3 // from here on there is a number for each name: its id, when it was made, and the like
	shownLast   protowire.Number = 8

	statusErrorCode protowire.Number = 1
	statusCode      protowire.Number = 3
)

// listMilvusOverGRPC asks for all collections even if the client names some: that others are not there is not its business.
func listMilvusOverGRPC(r *http.Request, q *question, message []byte) ([]byte, error) {
	only, what := map[string]bool{}, uint64(0)
	err := fields(message, func(f field) error {
		switch f.number {
		case showType:
			types, err := f.varints()
			what = cmp.Or(append(types, 0)...)
			return err
		case showNames:
			name, err := f.bytes()
			only[string(name)] = true
			return err
		}
		return nil
	})
	if err != nil {
		return nil, refusal{http.StatusBadRequest, err.Error()}
	}
	ask := appendBytes(nil, showDatabase, []byte(q.endpoint.Database.Name))
	ask = protowire.AppendVarint(protowire.AppendTag(ask, showType, protowire.VarintType), what)
	told, err := q.store.rpc(r.Context(), "/milvus.proto.milvus.MilvusService/ShowCollections", ask)
	if err != nil {
		return nil, err
	}
	names, numbers, err := shown(told)
	if err != nil {
		return nil, err
	}
	list := appendBytes(nil, shownStatus, nil) // success
	at := map[string]int{}
	for row, name := range names {
		at[name] = row
	}
	var rows []int
	for _, name := range q.visibleNames(names, stored) {
		if len(only) == 0 || only[name] {
			rows = append(rows, at[name])
			list = appendBytes(list, shownNames, []byte(name))
		}
	}
	for n := shownFirst; n <= shownLast; n++ {
		var packed []byte
		for _, row := range rows {
			if len(numbers[n]) == len(names) { // else nobody can tell whose they are
				packed = protowire.AppendVarint(packed, numbers[n][row])
			}
		}
		if packed != nil {
			list = appendBytes(list, n, packed)
		}
	}
	return list, nil
}

// shown reads a ShowCollectionsResponse: the names, and by field the numbers that belong to them.
func shown(message []byte) (names []string, numbers map[protowire.Number][]uint64, err error) {
	numbers = map[protowire.Number][]uint64{}
	err = fields(message, func(f field) error {
		switch {
		case f.number == shownStatus:
			status, err := f.bytes()
			if err != nil {
				return err
			}
			return fields(status, failed)
		case f.number == shownNames:
			name, err := f.bytes()
			if names = append(names, string(name)); len(names) > maxItems {
				err = errTooMany
			}
			return err
		case f.number >= shownFirst && f.number <= shownLast:
			more, err := f.varints()
			numbers[f.number] = append(numbers[f.number], more...)
			return err
		}
		return nil
	})
	return names, numbers, err
}

// failed is an error if the field of a status says so.
func failed(f field) error {
	if f.number != statusErrorCode && f.number != statusCode {
		return nil
	}
	codes, err := f.varints()
	if err == nil && slices.Max(append(codes, 0)) != 0 {
		err = fmt.Errorf("show collections: code %d", codes)
	}
	return err
}
